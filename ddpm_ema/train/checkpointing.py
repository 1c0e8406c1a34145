"""Checkpoints and snapshots of a run: collected from all ranks, copied to host memory, written in the background by rank 0."""

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import numpy as np
import torch
from torch import Tensor

from ddpm_ema.averaging.coefficients import RAW
from ddpm_ema.averaging.files import save_tensors
from ddpm_ema.averaging.profiles import Profile, profile_to_dict
from ddpm_ema.averaging.snapshots import write_snapshot
from ddpm_ema.config import Config, digest, to_dict
from ddpm_ema.own_statistics import with_own_statistics
from ddpm_ema.rundir import OPTIMIZER_FILE, RunDir, as_user_error, buffers_file, weights_file
from ddpm_ema.train import optimizer
from ddpm_ema.train.step import read_checks
from ddpm_ema.train.trainer import Trainer

WEIGHTING_POINTS = 200


def save(trainer: Trainer) -> None:
    """Copies the whole state to rank 0's memory and hands it to the writer. A collective; waits for an earlier write."""
    read_checks(trainer, lag=0)
    with trainer.metrics_log.timed("save_seconds"):
        finish_saving(trainer)
        names = ("raw", *trainer.bank.profiles)
        files = {weights_file(name): gathered(trainer, name) for name in names}
        sums = trainer.processes.gather(trainer.means.sums.tolist())  # one vector per rank
        trainer.saved_step = trainer.step
        if trainer.processes.is_main:
            files |= {buffers_file(n): host_copy(held) for n in names if (held := trainer.buffers(n))}
            files[OPTIMIZER_FILE] = host_copy(optimizer.named_state(trainer.optimizer, trainer.parameters))
            manifest = _manifest(trainer, sums)
            trainer.writer.submit(_write, trainer.rundir, trainer.step, files, manifest, trainer.config)


def _write(
    rundir: RunDir, step: int, files: dict[str, dict[str, Tensor]], manifest: dict[str, Any], config: Config
) -> None:
    rundir.write_checkpoint(step, files, manifest)
    rundir.prune(config.checkpoints.keep, config.checkpoints.keep_every)


def _manifest(trainer: Trainer, sums: list[list[float]]) -> dict[str, Any]:
    """What manifest.json says beside step and files; `sums` are those of the running means, by rank."""
    settings, dataset, profiles = to_dict(trainer.config), trainer.dataset, trainer.bank.profiles
    return {
        "seed": trainer.config.seed,
        "settings": settings,
        "settings_digest": digest(settings),
        "dataset": {"name": dataset.name, "size": len(dataset), "fingerprint": dataset.fingerprint},
        "world_size": trainer.processes.world_size,
        "profiles": {name: profile_to_dict(profile) for name, profile in profiles.items()},
        "versions": {"python": platform.python_version()}
        | {library.__name__: library.__version__ for library in (torch, np, diffusers, accelerate)},
        "parameters": sum(p.numel() for p in trainer.network.parameters()),
        "window": sums,
        "skipped_steps": trainer.skipped_steps,
        "scaler": trainer.scaler.state_dict(),
        "weightings": {name: weighting_points(profile, trainer.step) for name, profile in profiles.items()},
    }


def weighting_points(profile: Profile, step: int) -> list[float]:
    """The profile's weighting of the steps so far as a density over [0, 1] at 200 points, for the report."""
    density = np.diff(profile.cumulative(step, np.linspace(0, step, WEIGHTING_POINTS + 1))) * WEIGHTING_POINTS
    return [float(value) for value in density]


def save_snapshots(trainer: Trainer) -> None:
    """Stores what post-hoc reconstruction starts from; at step 0 the initial weights. A collective."""
    read_checks(trainer, lag=0)
    config, step = trainer.config, trainer.step
    dtype = getattr(torch, config.checkpoints.snapshot_dtype)
    with trainer.metrics_log.timed("save_seconds"):
        finish_saving(trainer)
        for name in config.snapshot_names if step else ("raw",):
            tensors = gathered(trainer, name)
            if trainer.processes.is_main:
                path, profile = trainer.rundir.snapshot_path(step, name), trainer.bank.profiles.get(name, RAW)
                buffers = host_copy(trainer.buffers(name))
                trainer.writer.submit(_write_snapshot, path, tensors, buffers, step, profile, dtype)


def _write_snapshot(
    path: Path, tensors: dict[str, Tensor], buffers: dict[str, Tensor], step: int, profile: Profile, dtype: torch.dtype
) -> None:
    with as_user_error(path, sum(tensor.nbytes for tensor in tensors.values())):
        if buffers:
            save_tensors(path.parent / buffers_file(path.stem), buffers)
        write_snapshot(path, tensors, step, profile, dtype)


def finish_saving(trainer: Trainer) -> None:
    """Waits until everything is on disk. Raises on every rank the error of an earlier write of rank 0. A collective."""
    with trainer.processes.sharing_errors():
        trainer.writer.wait()


def full_weights(trainer: Trainer, name: str) -> dict[str, Tensor]:
    """What `raw` or an average is sampled with, on every rank: fp32 parameters, and its own buffers. A collective.

    Each rank has statistics of its own images: those of rank 0 are taken, as in checkpoints.
    """
    if name == "raw":
        weights = {n: p.detach().float() for n, p in trainer.parameters.items()}
    else:
        weights = trainer.bank.gather_all(name, group=trainer.processes.control)
    buffers = trainer.buffers(name)
    if buffers and name != "raw":
        own = with_own_statistics(weights | buffers, trainer.config, trainer.processes.device, trainer.dataset)
        buffers = {n: own[n] for n in buffers}
    return weights | (trainer.processes.broadcast_tensors(host_copy(buffers)) if buffers else {})


def gathered(trainer: Trainer, name: str) -> dict[str, Tensor]:
    """`raw` or an average on rank 0, fp32 on the CPU, no longer touched by training; nothing elsewhere. A collective."""
    if name == "raw":
        return host_copy(trainer.parameters) if trainer.processes.is_main else {}
    if not trainer.split and not trainer.processes.is_main:
        return {}
    return dict(trainer.bank.gather(name, group=trainer.processes.control))


def host_copy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CPU copies that training no longer touches, in the order of bytes that files have: another would be copied once more."""
    order = torch.contiguous_format
    return {name: tensor.detach().to("cpu", copy=True, memory_format=order) for name, tensor in tensors.items()}
