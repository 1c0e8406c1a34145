"""A run from its last checkpoint to its end, or to the step at which it is asked to stop."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ddpm_ema import batch_order, compiling
from ddpm_ema.config import Config
from ddpm_ema.distributed import Processes, StopFlag
from ddpm_ema.errors import StoppedError, UserError
from ddpm_ema.messages import logger
from ddpm_ema.rundir import RunDir
from ddpm_ema.train.checkpointing import finish_saving, full_weights, save, save_snapshots
from ddpm_ema.train.preview import Preview
from ddpm_ema.train.resume import manifest_to_resume, restore
from ddpm_ema.train.step import check_lag, last_checkpoint, note_skipped_step, read_checks, train_step
from ddpm_ema.train.trainer import Evaluator, MakeEvaluator, MicroBatch, Trainer, build, check_capabilities


def run(config: Config, evaluate: MakeEvaluator | None = None) -> None:
    """Trains to `training.steps`, from the last checkpoint of `output_dir`; `evaluate` builds what scores while training.

    Raises:
        UserError: bad settings or input, an unusable folder, or a lost rank.
        DivergedError: a loss or gradient that is not finite.
        StoppedError: a signal ended the run after a save.
    """
    training = config.training
    check_capabilities(config)
    processes = Processes.start(
        config.machine.device,
        timeout=config.machine.timeout,
        expected=config.machine.world_size,
        trackers=training.trackers,
        project_dir=config.output_dir,
    )
    rundir = RunDir(config.output_dir)
    with StopFlag(nothing_to_save=True) as stop, processes.telling_peers(), _locked(rundir, processes):
        manifest = manifest_to_resume(config, rundir, processes)
        if manifest is not None and manifest["step"] >= training.steps:
            _say(processes, f"{rundir.path}: already complete at step {manifest['step']}; nothing to do")
        else:
            trainer = build(config, processes, rundir)
            with processes.naming_lost_ranks("training"), _memory_advice(trainer):
                restore(trainer, manifest)
                loop(trainer, stop, evaluate)
    processes.close()


def loop(trainer: Trainer, stop: StopFlag, evaluate: MakeEvaluator | None) -> None:
    """Steps until `training.steps`, or until any rank is asked to stop."""
    config, processes, metrics_log = trainer.config, trainer.processes, trainer.metrics_log
    evaluator = evaluate(config, processes, trainer.dataset) if evaluate and config.evaluation.every else None
    preview = Preview(trainer) if config.training.sample_every else None
    batches = batches_of(trainer)
    if config.training.compile:
        compiling.prepare("training.compile", lambda line: _say(processes, line))
    metrics_log.start(trainer.step)
    stop.nothing_to_save = False
    try:
        while trainer.step < config.training.steps:
            _end_if_asked(trainer, stop)
            with metrics_log.timed("data_wait"):
                micro_batches = next(batches)
            with compiling.explained("training.compile", stop):
                while not train_step(trainer, micro_batches):
                    note_skipped_step(trainer)
            read_checks(trainer, lag=check_lag(trainer))
            metrics_log.tick()
            _at_intervals(trainer, preview, evaluator)
        stop.drain(processes)
        finish_saving(trainer)
    finally:
        metrics_log.close()
        trainer.writer.close()
    _say(processes, f"{trainer.rundir.path}: complete at step {trainer.step}; ddpm-ema score compares its weights")


def _at_intervals(trainer: Trainer, preview: Preview | None, evaluator: Evaluator | None) -> None:
    """Logs, saves, samples and scores what is due after the step just completed."""
    config, step = trainer.config, trainer.step
    last = step == config.training.steps
    if step % config.training.log_every == 0 or last:
        log(trainer)
    if _due(step, config.checkpoints.snapshots_every) or (last and config.checkpoints.snapshots_every):
        save_snapshots(trainer)
    if preview is not None and _due(step, config.training.sample_every):
        with trainer.metrics_log.paused():
            preview.save(trainer)
    if evaluator is not None and _due(step, config.evaluation.every):
        read_checks(trainer, lag=0)
        with trainer.metrics_log.paused():
            try:
                trainer.metrics_log.write_scores(step, evaluator(step, lambda name: full_weights(trainer, name)))
            except UserError as error:  # on every rank, such as samples that are not finite: no reason to end training
                if type(error) is not UserError:
                    raise
                logger.warning(f"step {step} has no quick scores: {error}")
    if _due(step, config.checkpoints.every) or last:
        save(trainer)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _end_if_asked(trainer: Trainer, stop: StopFlag) -> None:
    """Saves and raises StoppedError when the ranks agree that one of them was asked to stop."""
    if trainer.writer.failed and stop.reason is None:
        stop.reason = "a checkpoint could not be written"
    if not stop.agreed(trainer.processes):
        return
    stop.drain(trainer.processes)
    if trainer.step > trainer.saved_step:
        save(trainer)
    finish_saving(trainer)
    reasons = [r for r in trainer.processes.gather(stop.reason) if r and not r.startswith("another")]
    raise StoppedError(
        f"stopped by {reasons[0] if reasons else stop.reason} at step {trainer.step}; saved, start again to go on"
    )


def batches_of(trainer: Trainer) -> Iterator[list[MicroBatch]]:
    """This process's micro-batches of every coming step, in order."""
    config, processes = trainer.config, trainer.processes
    training, size = config.training, len(trainer.dataset)
    mine = batch_order.partition(training.batch_size, processes.rank, processes.world_size)
    pieces = [torch.arange(p.start, p.stop) for p in batch_order.micro_batches(mine, training.micro_batch_size)]

    def one(step: int, positions: Tensor) -> MicroBatch:
        indices = batch_order.batch_indices(config.seed, step, positions, training.batch_size, size)
        return MicroBatch(positions, indices, trainer.dataset.batch(indices))

    for step in range(trainer.step, training.steps):
        yield [one(step, positions) for positions in pieces]


def log(trainer: Trainer) -> None:
    """One row: means since the last row, and the relative L2 distance of each average from raw. A collective.

    A row at a last step between two rows is marked `partial`: its steps stay in the sums that a checkpoint carries, and a
    longer run that goes on from there drops the row and counts them in the next one.
    """
    read_checks(trainer, lag=0)
    processes, step = trainer.processes, trainer.step
    row: dict[str, Any] = dict(trainer.means.means(processes))
    if step % trainer.config.training.log_every:
        row["partial"] = True
    else:
        trainer.means.sums.zero_()
    row["learning_rate"] = trainer.config.training.learning_rate_at(step - 1)
    row["skipped_steps"] = trainer.skipped_steps
    squares = trainer.bank.squared_distances()
    sums = torch.stack([*squares.values(), trainer.bank.squared_norm()]).cpu().double()
    if trainer.split:
        processes.sum_(sums)
    for (name, profile), square in zip(trainer.bank.profiles.items(), sums[:-1], strict=True):
        row[f"decay/{name}"] = profile.decay(step)
        row[f"distance/{name}"] = math.sqrt(square.item() / sums[-1].item())
    trainer.metrics_log.write(step, row)


@contextlib.contextmanager
def _locked(rundir: RunDir, processes: Processes) -> Iterator[None]:
    """Rank 0 holds the run directory; where it is refused, every rank raises the error."""
    with contextlib.ExitStack() as stack:
        with processes.sharing_errors():
            if processes.is_main:
                stack.enter_context(rundir.lock())
        yield


@contextlib.contextmanager
def _memory_advice(trainer: Trainer) -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "can't allocate memory" not in str(error):
            raise
        training = trainer.config.training
        held = training.micro_batch_size or math.ceil(training.batch_size / trainer.processes.world_size)
        raise UserError(
            f"out of memory at step {trainer.step + 1} on {trainer.processes.device}, with {held} images at once: lower "
            f"training.micro_batch_size (it does not change the result); {last_checkpoint(trainer)}"
        ) from None


def _say(processes: Processes, message: str) -> None:
    if processes.is_main:
        logger.info(message)
