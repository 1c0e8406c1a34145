"""Snapshots: stored averages as safetensors files whose metadata holds step, profile and update interval."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_ema.averaging import sharded
from ddpm_ema.averaging.checks import check_count
from ddpm_ema.averaging.files import open_safetensors, save_tensors
from ddpm_ema.averaging.profiles import Profile, profile_from_dict, profile_to_dict

ROUNDOFF = {"F64": 2.0**-53, "F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}
"""safetensors dtype -> largest relative error of rounding to it."""


@dataclass(frozen=True)
class Snapshot:
    """One stored average.

    Attributes:
        step: completed optimizer steps when it was stored; 0 for the initial weights.
        profile: its profile.
        path: its safetensors file.
        every: steps between its updates.
    """

    step: int
    profile: Profile
    path: Path
    every: int = 1

    @classmethod
    def open(cls, path: str | Path) -> Snapshot:
        """Read a file's metadata; no tensor is loaded.

        Raises:
            ValueError: not a safetensors file (pickles are refused unread), or without a snapshot's metadata.
            OSError: it cannot be read.
        """
        path = Path(path)
        with open_safetensors(path) as file:
            metadata = file.metadata() or {}
        try:
            described = json.loads(metadata["snapshot"])
            step, every = check_count("step", described["step"], 0), check_count("every", described["every"])
            settings = described["profile"]
        except (KeyError, TypeError, ValueError, OverflowError):
            raise ValueError(
                f"{path}: not a snapshot: its metadata has no valid 'snapshot' with step, every and profile"
            ) from None
        try:
            return cls(step, profile_from_dict(settings), path, every)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

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


def snapshot_metadata(step: int, profile: Profile, every: int = 1, **more: Any) -> dict[str, str]:
    """Metadata of a snapshot's file, in one entry, since safetensors writes several in random order."""
    described = {"step": step, "every": every, "profile": profile_to_dict(profile), **more}
    return {"snapshot": json.dumps(described, sort_keys=True)}


def write_snapshot(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    step: int,
    profile: Profile,
    dtype: torch.dtype = torch.float32,
    every: int = 1,
) -> Snapshot:
    """Store an average, whole or not at all (`files.save_tensors`). Equal ones give equal bytes.

    Args:
        path: the file; its folder is made if need be.
        tensors: name -> tensor of any dtype, layout and device. With DTensors this is a collective, and the first process of their
            mesh writes.
        step: completed optimizer steps; 0 for the initial weights, with any profile.
        profile: its profile; `RAW` for parameters that are not averaged.
        dtype: torch.float32, or torch.bfloat16 for half the bytes and a larger rounding error.
        every: steps between updates of the average, `num_steps` of `AverageBank.update`.

    Raises:
        ValueError: another dtype, a step or steps between updates that are no such number, or a profile that could not be read back.
        OSError: it cannot be written.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype: snapshots are stored as torch.float32 or torch.bfloat16, got {dtype}")
    step, every = check_count("step", step, 0), check_count("every", every)
    path = Path(path)
    writes = all(map(sharded.is_first, tensors.values()))
    stored = {}
    for name, tensor in tensors.items():
        found = sharded.whole(tensor)
        if writes:
            stored[name] = found.to("cpu", dtype)
    if writes:
        save_tensors(path, stored, snapshot_metadata(step, profile, every))
    return Snapshot(step=step, profile=profile, path=path, every=every)
