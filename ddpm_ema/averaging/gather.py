"""Bring tensors that are split over ranks together again, one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor


def gather(
    names: list[str],
    owners: Mapping[str, int],
    owned: Mapping[str, Tensor],
    shapes: Mapping[str, torch.Size],
    *,
    rank: int,
    dst: int,
    group: dist.ProcessGroup | None,
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor on `dst`, in the order of `names`, as fp32 CPU tensors; nothing elsewhere.

    A collective: `dst` must exhaust the iterator, the other ranks send when they call. At most one tensor is in flight.

    Args:
        names: all tensors, in the same order on every rank.
        owners: name -> rank that has it.
        owned: what this rank has.
        shapes: name -> shape, of all of them.
        rank: this process in the group.
        dst: the process in the group that gets them.
        group: process group, None for the default one.
    """
    if rank == dst:
        return _receive(names, owners, owned, shapes, rank=rank, group=group)
    for name in names:
        if owners[name] == rank:
            dist.send(_wire(owned[name], group), _global(dst, group), group=group)
    return iter(())


def _receive(
    names: list[str],
    owners: Mapping[str, int],
    owned: Mapping[str, Tensor],
    shapes: Mapping[str, torch.Size],
    *,
    rank: int,
    group: dist.ProcessGroup | None,
) -> Iterator[tuple[str, Tensor]]:
    for name in names:
        if owners[name] == rank:
            yield name, owned[name].detach().cpu().contiguous().clone()
            continue
        buffer = torch.empty(shapes[name], dtype=torch.float32, device=_wire_device(group))
        dist.recv(buffer, _global(owners[name], group), group=group)
        yield name, buffer.cpu()


def gather_all(
    names: list[str],
    owners: Mapping[str, int],
    owned: Mapping[str, Tensor],
    references: Mapping[str, Tensor],
    *,
    rank: int,
    group: dist.ProcessGroup | None,
) -> dict[str, Tensor]:
    """Every tensor on every rank, fp32, each on its reference's device: a broadcast from each owner, one at a time."""
    everything: dict[str, Tensor] = {}
    for name in names:
        reference = references[name]
        if owners[name] == rank:
            tensor = _wire(owned[name], group)
        else:
            tensor = torch.empty(reference.shape, dtype=torch.float32, device=_wire_device(group))
        dist.broadcast(tensor, _global(owners[name], group), group=group)
        everything[name] = tensor.to(reference.device)
    return everything


def require_group(world_size: int, group: dist.ProcessGroup | None) -> None:
    """Refuse to gather a split bank where there is nothing to gather over.

    Raises:
        ValueError: torch.distributed is not initialised, or the group has another size than the bank's world.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            f"gather: the bank is split over {world_size} processes, but torch.distributed is not initialised"
        )
    if dist.get_world_size(group) != world_size:
        raise ValueError(
            f"gather: the bank is split over {world_size} processes, the group has {dist.get_world_size(group)}"
        )


def _wire(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """A contiguous copy that the backend can send (a copy, so that the live average is never handed out)."""
    return tensor.detach().to(_wire_device(group), copy=True, memory_format=torch.contiguous_format)


def _wire_device(group: dist.ProcessGroup | None) -> torch.device:
    if "nccl" in dist.get_backend(group):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _global(rank: int, group: dist.ProcessGroup | None) -> int:
    return rank if group is None else dist.get_global_rank(group, rank)
