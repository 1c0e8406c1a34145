"""A run's state to checkpoints and back: copied to host memory, written by a background thread, read by rank 0 alone.

What a resumed run may change is decided by the settings' marks (`config.Effect.RUN`), and held to here, in `check_resume`.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy
import torch
from torch import Tensor

from ddpm_ema.config import Config, Effect, differing, digest, to_dict
from ddpm_ema.distributed import Processes
from ddpm_ema.errors import UserError
from ddpm_ema.messages import logger
from ddpm_ema.rundir import Checkpoint, RunDir


class Saver:
    """Writes checkpoints and snapshots one after another in a background thread of rank 0."""

    def __init__(self, rundir: RunDir) -> None:
        self.rundir = rundir
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="saver")
        self._pending: list[Future[None]] = []

    def submit(self, write: Callable[[], None]) -> None:
        """Queues one write; call `wait` first, so that at most one host copy of the state is held."""
        self._pending.append(self._thread.submit(write))

    @property
    def failed(self) -> bool:
        """Whether a write that is over went wrong; `wait` raises its error."""
        return any(f.done() and f.exception() is not None for f in self._pending)

    def wait(self) -> None:
        """Until all is on disk. Raises the first error of a write."""
        pending, self._pending = self._pending, []
        errors = [error for future in pending if (error := future.exception()) is not None]
        if errors:
            raise errors[0]

    def close(self) -> None:
        self._thread.shutdown(wait=True)


def host_copy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CPU copies that training no longer touches."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def manifest_of(
    config: Config, dataset: Any, world_size: int, profiles: Mapping[str, Any], **more: Any
) -> dict[str, Any]:
    """What manifest.json says beside step and files."""
    import accelerate
    import diffusers

    settings = to_dict(config)
    return {
        "seed": config.seed,
        "settings": settings,
        "settings_digest": digest(settings),
        "dataset": {"name": dataset.name, "size": len(dataset), "fingerprint": dataset.fingerprint},
        "world_size": world_size,
        "profiles": dict(profiles),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
            "diffusers": diffusers.__version__,
            "accelerate": accelerate.__version__,
        },
        **more,
    }


def find_checkpoint(config: Config, rundir: RunDir, processes: Processes) -> Checkpoint | None:
    """Rank 0: where the run goes on (None: from the start), by `training.resume`. Clears what was written after that point.

    Raises UserError where every checkpoint is bad: starting over is for a person to say.
    """
    if config.training.resume == "fresh":
        if aside := rundir.move_aside():
            logger.info(f"starting afresh; what was in {rundir.path} is now in {aside}")
        return None
    if config.training.resume == "never" and rundir.checkpoints():
        raise UserError(
            f"output_dir {rundir.path}: holds checkpoints, and training.resume is never; choose another folder"
        )
    checkpoint, passed_over = rundir.newest_whole()
    if checkpoint is None and passed_over:
        reasons = "\n  ".join(passed_over)
        raise UserError(
            f"{rundir.path}: no checkpoint is whole:\n  {reasons}\n--training.resume fresh keeps them aside and starts over"
        )
    for reason in passed_over:
        logger.warning(f"passed over a checkpoint that is not whole: {reason}")
    if checkpoint is not None:
        check_resume(config, checkpoint, processes.world_size)
    at = checkpoint.step if checkpoint else 0
    goes_on = checkpoint is None or at < config.training.steps or bool(passed_over)
    if goes_on and (aside := rundir.drop_after(at)):
        logger.info(f"scores and sample grids of steps after {at}, which are trained anew, are now in {aside}")
    return checkpoint


def check_resume(config: Config, checkpoint: Checkpoint, world_size: int) -> None:
    """Raises UserError that lists every setting that differs and may not; says what differs and may."""
    if checkpoint.manifest.get("imported"):
        raise UserError(f"{checkpoint.path}: was imported, without the optimizer's state; it cannot be trained further")
    was, now = checkpoint.manifest["settings"], to_dict(config)
    where = f"{checkpoint.path}: this run was made with other settings"
    problems = []
    for key, before, after in differing(was, now, Effect.RUN):
        if key == "averages":
            problems += _average_differences(before, after, config.training.allow_new_averages)
        elif key != "training.batch_size":
            problems.append(f"{key}: was {before}, is {after}")
        elif not config.training.allow_batch_size_change:
            hint = "--training.allow-batch-size-change goes on; the data stream is then another"
            problems.append(f"{key}: was {before}, is {after} ({hint})")
    if problems:
        lines = "\n  ".join(problems)
        raise UserError(f"{where}:\n  {lines}\nUse those settings, another output_dir, or --training.resume fresh")
    if (before := checkpoint.manifest["world_size"]) != world_size:
        logger.info(
            f"going on with {world_size} process(es) instead of {before}: the same sample stream, sums in another order"
        )


def check_dataset(checkpoint_manifest: Mapping[str, Any], dataset: Any) -> None:
    """Raises UserError that names both data sets where they are not the same images."""
    was = checkpoint_manifest["dataset"]
    if (was["size"], was["fingerprint"]) != (len(dataset), dataset.fingerprint):
        raise UserError(
            f"data: the run was trained on {was['name']} ({was['size']} images, fingerprint {was['fingerprint'][:12]}), this is "
            f"{dataset.name} ({len(dataset)} images, fingerprint {dataset.fingerprint[:12]}); "
            "bring back those images or choose another output_dir"
        )


def _average_differences(before: Mapping[str, Any], after: Mapping[str, Any], allow_new: bool) -> list[str]:
    problems = [f"averages.{name}: was {before[name]}, is gone" for name in before if name not in after]
    for name, profile in after.items():
        if name not in before:
            if not allow_new:
                problems.append(
                    f"averages.{name}: is new (--training.allow-new-averages starts it at this step's raw weights)"
                )
        elif profile != before[name]:
            problems.append(f"averages.{name}: was {before[name]}, is {profile}")
    return problems
