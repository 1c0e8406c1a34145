"""What other programs stored: which files, of which step, averaged by which profile, and how to read their tensors."""

import glob
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_ema.averaging.coefficients import RAW
from ddpm_ema.averaging.interop import read_diffusers_ema
from ddpm_ema.averaging.naming import clean_named
from ddpm_ema.averaging.profiles import Profile
from ddpm_ema.errors import UserError, explained, one_line
from ddpm_ema.named_weights import PipelineFolder, name_of
from ddpm_ema.rundir import read_tensors

Tensors = dict[str, Tensor]
CHECKPOINT = re.compile(r"checkpoint-(\d{1,15})")
_SHOWN = 5  # files or tensors named in a message

CURE = (
    'if you trust where it is from, convert it: python -c "import sys, torch; from safetensors.torch import save_file; '
    "state = torch.load(sys.argv[1], map_location='cpu', weights_only=False); "
    "state = state.state_dict() if hasattr(state, 'state_dict') else state.get('state_dict', state); "
    'save_file({k: v.clone() for k, v in state.items() if torch.is_tensor(v)}, sys.argv[2])" {path} {path}.safetensors'
)


@dataclass(frozen=True)
class Found:
    """Weights that were found; `read` gives their floating-point tensors by clean parameter name."""

    step: int
    name: str
    profile: Profile
    path: Path
    read: Callable[[], Tensors]


def diffusers_checkpoints(source: Path) -> tuple[list[Found], list[str]]:
    """The `checkpoint-N/unet` and `unet_ema` of diffusers' train_unconditional.py, and notes on what was left out.

    Raises UserError for a checkpoint without a U-Net, or whose weights are a pickle.
    """
    matches = [(CHECKPOINT.fullmatch(path.name), path) for path in source.glob("checkpoint-*") if path.is_dir()]
    found, notes = [], []
    for step, folder in sorted((int(match[1]), path) for match, path in matches if match):
        files = PipelineFolder(folder / "unet").files
        found.append(Found(step, "raw", RAW, folder / "unet", partial(_merged, files)))
        path = folder / "unet_ema"
        if not path.is_dir():
            continue
        average = _diffusers_ema(path)
        if average.step == step:
            found.append(Found(step, "unet_ema", average.profile, path, partial(_merged, PipelineFolder(path).files)))
        else:
            notes.append(
                f"{path}: left out: it was updated {average.step:,} times in {step:,} steps, so its profile is unknown"
            )
    return found, notes


def _merged(files: Iterable[Path]) -> Tensors:
    return {name: tensor for file in files for name, tensor in read_tensors(file).items()}


def _diffusers_ema(path: Path) -> Any:
    try:
        return read_diffusers_ema(path)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no average of diffusers' EMAModel can be read: {error}") from None


def series(source: Path, pattern: str, profile: Profile, prefix: str = "", key: str | None = None) -> list[Found]:
    """Files of one kind of weights below the folder `source`, by step.

    Args:
        pattern: their path below it, with `{step}` or `*`: `step_{step}.safetensors`, `epoch=*-step={step}.ckpt`.
        prefix: of the tensors to take, such as `ema_model.`; it is cut off, and tensors without it are left out.
        key: where a torch file holds its state dict, such as `ema.state_dict`; by itself, `state_dict` or the whole file.

    Raises UserError where no file fits the pattern, a file's step is unknown, or two files are of one step.
    """
    tokens = re.split(r"(\{step\}|\*|\?)", pattern)
    wildcards = {"{step}": ("*", r"(\d{1,15})"), "*": ("*", "[^/]*"), "?": ("?", "[^/]")}
    parts = [wildcards.get(token, (glob.escape(token), re.escape(token))) for token in tokens]
    expression = re.compile("".join(part for _, part in parts))
    if Path(pattern).is_absolute() or pattern.count("{step}") > 1:
        raise UserError(f"--pattern {pattern}: expected a path below {source}, with one {{step}} at most")
    files = {
        path: expression.fullmatch(path.relative_to(source).as_posix())
        for path in source.glob("".join(p for p, _ in parts))
    }
    name = "raw" if profile == RAW else name_of(profile)
    found: dict[int, Found] = {}
    for path, match in sorted(files.items()):
        if match is None or not path.is_file():
            continue
        step = int(match[1]) if match.groups() else _step_inside(path)
        if step in found:
            raise UserError(f"--pattern {pattern}: {found[step].path} and {path} are both of step {step}")
        found[step] = Found(step, name, profile, path, partial(_read, path, prefix, key))
    if not found:
        there = sorted(path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file())
        some = ", ".join(there[:_SHOWN] + ["others"] * (len(there) > _SHOWN)) or "none"
        raise UserError(f"--pattern {pattern}: fits no file in {source}; there are {some}")
    return [found[step] for step in sorted(found)]


def _step_inside(path: Path) -> int:
    """What a torch file says of its step (global_step or step), else the one number in the file's name."""
    content = None if path.suffix == ".safetensors" else _content(path)
    for said in (content.get("global_step"), content.get("step")) if isinstance(content, Mapping) else ():
        if isinstance(said, int):
            return said
    numbers = re.findall(r"\d+", path.stem)
    if len(numbers) != 1:
        raise UserError(f"{path}: its step is unknown; write {{step}} where the step stands in --pattern")
    return int(numbers[0])


def _content(path: Path) -> Any:
    """What a safetensors or a torch file holds; no code in it runs. Raises UserError for one that needs that."""
    if path.suffix == ".safetensors":
        return read_tensors(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        needs = re.search(r"GLOBAL (\S+)", str(error))
        what, cure = f"it needs {needs[1]}" if needs else "it is a pickle", CURE.replace("{path}", str(path))
        raise UserError(f"{path}: {what}, and reading that can run code: refused. {cure}") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: no torch file that can be read: {one_line(error)}") from None


def _read(path: Path, prefix: str, key: str | None) -> Tensors:
    state = _content(path)
    if key is None and isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    for part in key.split(".") if key else ():
        state = {str(i): one for i, one in enumerate(state)} if isinstance(state, list) else state
        if not isinstance(state, Mapping) or part not in state:
            raise UserError(f"{path}: --key {key}: nothing is called {part!r}{_names(state)}")
        state = state[part]
    named = {str(n): t for n, t in state.items() if torch.is_tensor(t)} if isinstance(state, Mapping) else {}
    if not named:
        raise UserError(f"{path}: holds no tensors by name{_names(state)}; name where they lie with --key")
    taken = {n.removeprefix(prefix): t for n, t in named.items() if n.startswith(prefix) and t.is_floating_point()}
    if not taken:
        raise UserError(f"{path}: --prefix {prefix}: no weights begin so{_names(named)}")
    with explained("", ValueError, after="; choose one with --prefix"):
        return clean_named(taken.items(), str(path))


def _names(state: Any) -> str:
    return f"; there are {', '.join(map(str, list(state)[:_SHOWN]))}" if isinstance(state, Mapping) else ""
