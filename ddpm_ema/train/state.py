"""The state of a run: to checkpoints and snapshots, and back. All ranks take part; only rank 0 touches files."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm_ema import optimization
from ddpm_ema.averaging.coefficients import RAW
from ddpm_ema.averaging.profiles import Profile, profile_to_dict
from ddpm_ema.averaging.snapshots import write_snapshot
from ddpm_ema.config import Config, to_yaml
from ddpm_ema.errors import UserError
from ddpm_ema.messages import logger
from ddpm_ema.rundir import RunDir, atomic_write, explained, step_folder
from ddpm_ema.saving import check_dataset, host_copy, manifest_of
from ddpm_ema.train.step import read_checks
from ddpm_ema.train.trainer import Trainer

WEIGHTING_POINTS = 200


def save(trainer: Trainer) -> None:
    """Copies the whole state to rank 0's memory and hands it to the writer. A collective; waits for an earlier write."""
    read_checks(trainer, lag=0)
    config, processes, bank, step = trainer.config, trainer.processes, trainer.bank, trainer.step
    with trainer.logbook.timed("save_seconds"):
        _wait_for_writer(trainer)
        files: dict[str, dict[str, Tensor]] = {}
        for name in bank.profiles:
            files[f"averages/{name}.safetensors"] = gathered(trainer, name)
        window = trainer.window.state(processes)
        trainer.saved_step = step
        if not processes.is_main:
            return
        files["raw.safetensors"] = host_copy(trainer.network.state_dict())
        state = optimization.named_state(trainer.optimizer, trainer.parameters)
        files["optimizer.safetensors"] = host_copy(state)
        manifest = manifest_of(
            config,
            trainer.dataset,
            processes.world_size,
            {name: profile_to_dict(profile) for name, profile in bank.profiles.items()},
            parameters=sum(p.numel() for p in trainer.network.parameters()),
            window=window,
            skipped_steps=trainer.skipped_steps,
            scaler=trainer.scaler.state_dict(),
            weightings={name: weighting_points(profile, step) for name, profile in bank.profiles.items()},
        )
        trainer.saver.submit(functools.partial(_write, trainer.rundir, step, files, manifest, config))


def _write(
    rundir: RunDir, step: int, files: dict[str, dict[str, Tensor]], manifest: dict[str, Any], config: Config
) -> None:
    rundir.write_checkpoint(step, files, manifest)
    rundir.prune(config.checkpoints.keep, config.checkpoints.keep_every)


def _wait_for_writer(trainer: Trainer) -> None:
    """Raises on every rank what went wrong in rank 0's earlier write."""
    error = None
    try:
        trainer.saver.wait()
    except UserError as caught:
        error = caught
    trainer.processes.raise_together(error)


def finish_saving(trainer: Trainer) -> None:
    """Until everything is on disk. A collective."""
    with trainer.logbook.timed("save_seconds"):
        _wait_for_writer(trainer)


def weighting_points(profile: Profile, step: int) -> list[float]:
    """The profile's weighting of the steps so far as a density over [0, 1] at 200 points, for the report."""
    density = np.diff(profile.cumulative(step, np.linspace(0, step, WEIGHTING_POINTS + 1))) * WEIGHTING_POINTS
    return [float(value) for value in density]


def save_snapshots(trainer: Trainer) -> None:
    """Stores what post-hoc reconstruction starts from; at step 0 the initial weights. A collective."""
    read_checks(trainer, lag=0)
    config, step, rundir = trainer.config, trainer.step, trainer.rundir
    dtype = getattr(torch, config.checkpoints.snapshot_dtype)
    with trainer.logbook.timed("save_seconds"):
        _wait_for_writer(trainer)
        for name in config.snapshot_names if step else ("raw",):
            tensors = gathered(trainer, name)
            if trainer.processes.is_main:
                path, profile = rundir.snapshot_path(step, name), trainer.bank.profiles.get(name, RAW)
                trainer.saver.submit(functools.partial(_write_one, path, tensors, step, profile, dtype))


def _write_one(path: Path, tensors: dict[str, Tensor], step: int, profile: Profile, dtype: torch.dtype) -> None:
    with explained(path, sum(tensor.nbytes for tensor in tensors.values())):
        write_snapshot(path, tensors, step, profile, dtype)


def full_weights(trainer: Trainer, name: str) -> dict[str, Tensor]:
    """The fp32 weights of one copy, whole, on every rank. A collective when the averages are split."""
    if name == "raw":
        return {k: v.detach().float() for k, v in trainer.network.state_dict().items()}
    return trainer.bank.gather_all(name, group=trainer.processes.control)


def gathered(trainer: Trainer, name: str) -> dict[str, Tensor]:
    """One copy on rank 0, fp32 on the CPU, no longer touched by training; nothing elsewhere. A collective."""
    if name == "raw":
        return host_copy(trainer.parameters) if trainer.processes.is_main else {}
    if not trainer.split and not trainer.processes.is_main:
        return {}
    return dict(trainer.bank.gather(name, group=trainer.processes.control))


def restore(trainer: Trainer, manifest: dict[str, Any] | None) -> None:
    """Brings every rank to the state of a checkpoint, whose files only rank 0 reads. A collective."""
    processes, config = trainer.processes, trainer.config
    if manifest is None:
        if processes.is_main:
            atomic_write(trainer.rundir.config_path, to_yaml(config))
        if config.checkpoints.snapshots_every:
            save_snapshots(trainer)
    else:
        check_dataset(manifest, trainer.dataset)
        step = manifest["step"]
        checkpoint = trainer.rundir.checkpoint(step) if processes.is_main else None

        def tensors(file: str) -> dict[str, Tensor]:
            return processes.broadcast_tensors(checkpoint.tensors(file) if checkpoint else None)

        trainer.network.load_state_dict(tensors("raw.safetensors"))
        state = tensors("optimizer.safetensors")
        optimization.load_named_state(trainer.optimizer, trainer.parameters, state)
        for name in trainer.bank.profiles:
            known = name in manifest["profiles"]
            weights = tensors(f"averages/{name}.safetensors") if known else dict(trainer.network.state_dict())
            trainer.bank.load_weights(name, weights)
        trainer.step = trainer.saved_step = step
        trainer.skipped_steps = manifest["skipped_steps"]
        trainer.scaler.load_state_dict(manifest["scaler"])
        trainer.window.load(manifest["window"], processes)
        if processes.is_main:
            atomic_write(trainer.rundir.config_path, to_yaml(config))
        if processes.is_main:
            logger.info(f"going on from {trainer.rundir.path / 'checkpoints' / step_folder(step)}")
    trainer.logbook.start_trackers(config.training.trackers, config.model_dump(mode="json"))
