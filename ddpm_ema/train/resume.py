"""From which checkpoint a run goes on, what its settings may change, and how its state is restored.

Only rank 0 reads files. What may change is decided by the settings' marks (`config.Effect.RUN`).
"""

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ddpm_ema.config import Config, Effect, differing, to_dict, to_yaml
from ddpm_ema.distributed import Processes
from ddpm_ema.errors import UserError, explained
from ddpm_ema.messages import logger
from ddpm_ema.rundir import OPTIMIZER_FILE, Checkpoint, RunDir, atomic_write, buffers_file, step_folder, weights_file
from ddpm_ema.train import optimizer
from ddpm_ema.train.checkpointing import save_snapshots
from ddpm_ema.train.trainer import Trainer


def manifest_to_resume(config: Config, rundir: RunDir, processes: Processes) -> dict[str, Any] | None:
    """The manifest of the checkpoint to go on from, on every rank; None for a run from the start. A collective."""

    def found() -> dict[str, Any] | None:
        checkpoint = find_checkpoint(config, rundir, processes.world_size)
        return checkpoint.manifest if checkpoint else None

    return processes.on_main(found, "checking the checkpoints")


def find_checkpoint(config: Config, rundir: RunDir, world_size: int) -> Checkpoint | None:
    """The checkpoint to go on from by `training.resume`, None for the start. Clears what was written after that point.

    Raises:
        UserError: the settings differ in what may not change, or every checkpoint is bad: only the user decides to start over.
    """
    if starts_afresh(config, rundir):
        return None  # what an earlier run left moves aside in `restore`, when the new settings were seen to hold
    checkpoints = rundir.checkpoints()
    stored = checkpoints[-1].step if checkpoints else rundir.last_stored_step()
    if config.training.resume == "never" and (checkpoints or stored):
        raise UserError(f"output_dir {rundir.path}: holds a run, and training.resume is never; choose another folder")
    # A kill before the first checkpoint leaves rows and snapshots of fewer steps, which are made again, and an empty folder.
    before_first = stored < 2 * config.checkpoints.every and rundir.checkpoints_path.is_dir()
    if stored and not checkpoints and not before_first:
        raise UserError(
            f"{rundir.path}: holds no checkpoint, but metrics or snapshots up to step {stored}: bring the checkpoints back, or "
            "start over with --training.resume fresh, which keeps what is there in previous-N"
        )
    checkpoint = rundir.newest_usable("--training.resume fresh keeps them aside and starts over")
    if checkpoint is not None:
        check_resume(config, checkpoint, world_size)
    at = checkpoint.step if checkpoint else 0
    goes_on = checkpoint is None or at < max(config.training.steps, stored)
    if goes_on and (aside := rundir.drop_after(at)):
        logger.info(f"scores and sample grids of steps after {at}, which are trained anew, are now in {aside}")
    return checkpoint


def starts_afresh(config: Config, rundir: RunDir) -> bool:
    """Whether to start over. A requeued Slurm job goes on with what an earlier start of it began, if one came so far."""
    path, requeued = rundir.config_path, int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    began = requeued and path.is_file() and path.read_text(errors="replace").startswith(_mark(config))
    return config.training.resume == "fresh" and not began


def _mark(config: Config) -> str:
    """First line of the config.yaml of a run that a Slurm job starts afresh."""
    job = os.environ.get("SLURM_JOB_ID")
    return f"# started afresh by Slurm job {job}\n" if job and config.training.resume == "fresh" else ""


def check_resume(config: Config, checkpoint: Checkpoint, world_size: int) -> None:
    """Raises UserError that lists every setting that differs and may not; says what differs and may."""
    if checkpoint.manifest.get("imported"):
        raise UserError(f"{checkpoint.path}: was imported, without the optimizer's state; it cannot be trained further")
    problems = []
    for key, before, after in differing(checkpoint.manifest["settings"], to_dict(config), Effect.RUN):
        if key == "averages":
            problems += _average_differences(before, after, config.training.allow_new_averages)
        elif key != "training.batch_size":
            problems.append(f"{key}: was {before}, is {after}")
        elif not config.training.allow_batch_size_change:
            hint = "--training.allow-batch-size-change goes on; the data stream is then another"
            problems.append(f"{key}: was {before}, is {after} ({hint})")
    if problems:
        lines = "\n  ".join(problems)
        raise UserError(
            f"{checkpoint.path}: this run was made with other settings:\n  {lines}\n"
            "Use those settings, another output_dir, or --training.resume fresh"
        )
    if (before := checkpoint.manifest["world_size"]) != world_size:
        logger.info(
            f"going on with {world_size} process(es) instead of {before}: the same sample stream, sums in another order"
        )


def _average_differences(before: Mapping[str, Any], after: Mapping[str, Any], allow_new: bool) -> list[str]:
    problems = [f"averages.{name}: was {before[name]}, is gone" for name in before if name not in after]
    for name, profile in after.items():
        if name in before and profile != before[name]:
            problems.append(f"averages.{name}: was {before[name]}, is {profile}")
        if name not in before and not allow_new:
            hint = "--training.allow-new-averages starts it at this step's raw weights"
            problems.append(f"averages.{name}: is new ({hint})")
    return problems


def restore(trainer: Trainer, manifest: dict[str, Any] | None) -> None:
    """Brings every rank to the state of a checkpoint; without one, starts the run directory. A collective."""
    processes, config = trainer.processes, trainer.config
    if manifest is not None:
        check_dataset(manifest, trainer.dataset)
        _load(trainer, manifest)
    if processes.is_main:
        if starts_afresh(config, trainer.rundir) and (aside := trainer.rundir.move_aside()):
            logger.info(f"starting afresh; what was in {trainer.rundir.path} is now in {aside}")
        again = config.training.model_copy(update={"resume": "auto"})  # a later `train RUN` must not start over
        kept = to_yaml(config.model_copy(update={"training": again}))
        atomic_write(trainer.rundir.config_path, _mark(config) + kept)
        trainer.rundir.checkpoints_path.mkdir(exist_ok=True)
        if manifest is not None:
            logger.info(f"going on from {trainer.rundir.checkpoints_path / step_folder(trainer.step)}")
    if manifest is None and config.checkpoints.snapshots_every:
        save_snapshots(trainer)
    trainer.metrics_log.start_trackers(config.training.trackers, config.model_dump(mode="json"))


def check_dataset(manifest: Mapping[str, Any], dataset: Any) -> None:
    """Raises UserError that names both data sets where they are not the same images."""
    was = manifest["dataset"]
    if (was["size"], was["fingerprint"]) != (len(dataset), dataset.fingerprint):
        raise UserError(
            f"data: the run was trained on {was['name']} ({was['size']} images, fingerprint {was['fingerprint'][:12]}), this is "
            f"{dataset.name} ({len(dataset)} images, fingerprint {dataset.fingerprint[:12]}); "
            "bring back those images or choose another output_dir"
        )


def _load(trainer: Trainer, manifest: dict[str, Any]) -> None:
    """Takes network, optimizer, averages and counts of a checkpoint; an average that it lacks starts at its raw weights."""
    processes, step = trainer.processes, manifest["step"]
    checkpoint = trainer.rundir.checkpoint(step) if processes.is_main else None

    def tensors(file: str) -> dict[str, Tensor]:
        if file not in manifest["files"]:
            return {}
        return processes.broadcast_tensors(checkpoint.tensors(file) if checkpoint else None)

    raw, buffers = tensors(weights_file("raw")), tensors(buffers_file("raw"))
    with explained(f"step {step}: its weights are not of the network that the settings describe: ", RuntimeError):
        trainer.network.load_state_dict(raw | buffers)
    optimizer.load_named_state(trainer.optimizer, trainer.parameters, tensors(OPTIMIZER_FILE))
    for name in trainer.bank.profiles:
        known = name in manifest["profiles"]
        trainer.bank.load_weights(name, tensors(weights_file(name)) if known else raw)
        stored = tensors(buffers_file(name)) if known else buffers
        trainer.bank.load_buffers(name, trainer.bank.buffers(name) | stored)
    trainer.step = trainer.saved_step = step
    trainer.skipped_steps = manifest["skipped_steps"]
    trainer.scaler.load_state_dict(manifest["scaler"])
    trainer.means.load(manifest["window"], processes)
