"""Snapshots: stored averages with the step and the profile they were taken with, as safetensors files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ddpm_ema.averaging.files import HEAD_BYTES, is_pickle, save_tensors
from ddpm_ema.averaging.profiles import Profile, profile_from_dict, profile_to_dict

ROUNDOFF = {"F64": 2.0**-53, "F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}
"""safetensors dtype -> largest relative error of rounding to it."""

_DTYPES = {torch.float32, torch.bfloat16}


@dataclass(frozen=True)
class Snapshot:
    """One stored average.

    Attributes:
        step: completed optimizer steps when it was stored.
        profile: how it was averaged.
        path: its safetensors file.
    """

    step: int
    profile: Profile
    path: Path

    @classmethod
    def open(cls, path: str | Path) -> Snapshot:
        """Read what a snapshot is from its file's metadata; no tensor is loaded.

        Raises:
            ValueError: not a safetensors file (pickles are refused unread), or no snapshot's metadata in it.
            OSError: it cannot be read.
        """
        path = Path(path)
        with open_safetensors(path) as file:
            metadata = file.metadata() or {}
        try:
            step, settings = int(metadata["step"]), json.loads(metadata["profile"])
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path}: not a snapshot: its metadata has no valid 'step' and 'profile'") from error
        try:
            return cls(step=step, profile=profile_from_dict(settings), path=path)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def shapes(self) -> dict[str, torch.Size]:
        """Name -> shape of every tensor, from the header alone."""
        with open_safetensors(self.path) as file:
            return {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118

    def roundoff(self) -> float:
        """Largest relative rounding error among the dtypes stored: 2^-24 for fp32, 2^-8 for bf16."""
        with open_safetensors(self.path) as file:
            dtypes = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        return max((ROUNDOFF.get(dtype, 1.0) for dtype in dtypes), default=0.0)

    def tensors(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        """These tensors, one at a time, as stored."""
        with open_safetensors(self.path) as file:
            for name in names:
                yield name, file.get_tensor(name)


def find_snapshots(folder: str | Path) -> list[Snapshot]:
    """Every snapshot `step-XXXXXXXX/<name>.safetensors` below a folder, by step and name. Raises as `Snapshot.open`."""
    snapshots = [Snapshot.open(path) for path in sorted(Path(folder).glob("step-*/*.safetensors"))]
    return sorted(snapshots, key=lambda snapshot: (snapshot.step, snapshot.path.name))


def write_snapshot(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    step: int,
    profile: Profile,
    dtype: torch.dtype = torch.float32,
) -> Snapshot:
    """Store an average, whole or not at all: written beside the target, flushed to disk, renamed.

    Args:
        path: the file; its folder is made if need be.
        tensors: name -> tensor of any dtype, layout and device.
        step: completed optimizer steps.
        profile: how it was averaged.
        dtype: torch.float32, or torch.bfloat16 for half the bytes (docs/averaging.md says what is lost).

    Raises:
        ValueError: another dtype, or a negative step.
        OSError: it cannot be written.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype: snapshots are stored as torch.float32 or torch.bfloat16, got {dtype}")
    if step < 1:
        raise ValueError(f"step: expected at least 1 completed step, got {step!r}")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = {name: tensor.detach().to("cpu", dtype) for name, tensor in tensors.items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_tensors(temporary, stored, {"step": str(step), "profile": json.dumps(profile_to_dict(profile))})
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return Snapshot(step=step, profile=profile, path=path)


def open_safetensors(path: Path) -> safe_open:
    """`safe_open` on the CPU, with a message that says what is wrong with the file.

    Raises:
        ValueError: it is a pickle (refused unread), truncated, or otherwise no safetensors file.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
    if is_pickle(head):
        raise ValueError(
            f"{path}: this is a pickle, which can run code when it is read: refused. Convert it to safetensors"
        )
    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file: {error}") from error
