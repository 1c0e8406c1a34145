"""Named tensors: names without wrapper prefixes, shares of ranks, bounded parts, and strict comparison."""

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

import torch

WRAPPERS = frozenset({"_orig_mod", "module", "_checkpoint_wrapped_module"})
"""Name components that torch.compile, (Distributed)DataParallel and activation checkpointing put in front of what they wrap."""

_SHOWN = 8  # tensors listed in a message before it counts the rest
Key = TypeVar("Key")


def clean_name(name: str) -> str:
    """`module._orig_mod.conv.weight` and `conv._orig_mod.weight` -> `conv.weight`: the name in the unwrapped model."""
    *path, leaf = name.split(".")
    return ".".join([part for part in path if part not in WRAPPERS] + [leaf])


def clean_named(tensors: Iterable[tuple[str, torch.Tensor]], what: str) -> dict[str, torch.Tensor]:
    """Named tensors as a dict under clean names. Raises ValueError where two get the same name."""
    cleaned: dict[str, torch.Tensor] = {}
    original: dict[str, str] = {}
    for name, tensor in tensors:
        short = clean_name(name)
        if short in cleaned:
            both = f"{name!r} and {original[short]!r} are both called {short!r} without wrapper prefixes"
            twice = f"{name!r} is given twice; join several models in one torch.nn.ModuleDict"
            raise ValueError(f"{what}: {twice if name == original[short] else both}")
        cleaned[short], original[short] = tensor, name
    return cleaned


def assign_owners(sizes: Mapping[str, int], world_size: int) -> dict[str, int]:
    """Assign whole tensors to ranks: the largest first, each to the rank with the least so far (Graham 1969).

    The result depends on names and sizes alone, so it is the same on every rank, and has the order of `sizes`. No rank has more
    than the least loaded one plus the largest tensor.
    """
    loads = [0] * world_size
    owners: dict[str, int] = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        rank = min(range(world_size), key=lambda rank: (loads[rank], rank))
        owners[name] = rank
        loads[rank] += sizes[name]
    return {name: owners[name] for name in sizes}


def parts(sizes: Mapping[Key, int], limit: int) -> Iterator[list[Key]]:
    """Consecutive runs of keys whose sizes sum to at most `limit`; a key of larger size is a part of its own."""
    part: list[Key] = []
    total = 0
    for key, size in sizes.items():
        if part and total + size > limit:
            yield part
            part, total = [], 0
        part.append(key)
        total += size
    if part:
        yield part


def check_tensors(
    given: Mapping[str, torch.Tensor | torch.Size], expected: Mapping[str, torch.Size], what: str
) -> None:
    """Raises ValueError that names every missing, extra, misshaped (with both shapes) or meta tensor (or shape)."""
    shaped = {name: value for name, value in given.items() if isinstance(value, (torch.Tensor, tuple))}
    here = {name: tuple(getattr(value, "shape", value)) for name, value in shaped.items()}
    wanted = {name: tuple(shape) for name, shape in expected.items()}
    problems = [f"{name!r} is missing (expected {wanted[name]})" for name in wanted if name not in given]
    problems += [f"{name!r} is not known here ({here[name]})" for name in here if name not in wanted]
    wrong = [name for name in wanted if here.get(name, wanted[name]) != wanted[name]]
    problems += [f"{name!r} has shape {here[name]}, expected {wanted[name]}" for name in wrong]
    odd = [n for n, value in given.items() if not isinstance(value, tuple) and getattr(value, "is_meta", True)]
    problems += [f"{name!r} is no tensor with values" for name in odd]
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ValueError(f"{what}: {'; '.join(problems[:_SHOWN])}{more}")
