"""A run from where its folder stands to its end, or to the step at which it is asked to stop."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator, Iterator
from typing import Any

import torch
from torch import Tensor

from ddpm_ema import batch_order, compiling
from ddpm_ema.config import Config
from ddpm_ema.distributed import Processes, StopFlag
from ddpm_ema.errors import StoppedError, UserError
from ddpm_ema.messages import logger
from ddpm_ema.rundir import RunDir
from ddpm_ema.saving import find_checkpoint
from ddpm_ema.train.preview import Preview
from ddpm_ema.train.state import finish_saving, full_weights, restore, save, save_snapshots
from ddpm_ema.train.step import check_lag, last_checkpoint, note_skipped_step, read_checks, train_step
from ddpm_ema.train.trainer import Evaluator, MakeEvaluator, Share, Trainer, build, check_capabilities


def run(config: Config, evaluate: MakeEvaluator | None = None) -> None:
    """Trains to `training.steps`, from where `output_dir` stands. Raises UserError, DivergedError or StoppedError."""
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
    with StopFlag() as stop, processes.telling_peers(), _locked(rundir, processes):
        checkpoint = _where_to_go_on(config, rundir, processes)
        if checkpoint is not None and checkpoint["step"] >= training.steps:
            _say(processes, f"{rundir.path}: already complete at step {checkpoint['step']}; nothing to do")
        else:
            trainer = build(config, processes, rundir)
            with processes.naming_lost_ranks("training"), _memory_advice(trainer):
                restore(trainer, checkpoint)
                loop(trainer, stop, evaluate)
    processes.close()


def loop(trainer: Trainer, stop: StopFlag, evaluate: MakeEvaluator | None) -> None:
    """Steps until `training.steps`, or until any rank is asked to stop."""
    config, processes, logbook = trainer.config, trainer.processes, trainer.logbook
    evaluator = None
    if evaluate is not None and config.evaluation.every:
        evaluator = evaluate(config, processes, trainer.dataset)
    preview = Preview(trainer) if config.training.sample_every else None
    batches = _batches(trainer)
    if config.training.compile:
        compiling.prepare("training.compile", lambda line: _say(processes, line))
    logbook.start(trainer.step)
    try:
        while trainer.step < config.training.steps:
            _end_if_asked(trainer, stop)
            with logbook.timed("data_wait"):
                shares = next(batches)
            with compiling.explained("training.compile", stop):
                while not train_step(trainer, shares):
                    note_skipped_step(trainer)
            read_checks(trainer, lag=check_lag(trainer))
            logbook.tick()
            _at_intervals(trainer, preview, evaluator)
        stop.drain(processes)
        if trainer.saved_step != trainer.step:
            save(trainer)
        finish_saving(trainer)
    finally:
        batches.close()
        logbook.close()
        trainer.saver.close()
    _say(processes, f"{trainer.rundir.path}: complete at step {trainer.step}")


def _at_intervals(trainer: Trainer, preview: Preview | None, evaluator: Evaluator | None) -> None:
    """What is due after the step just completed."""
    config, step = trainer.config, trainer.step
    last = step == config.training.steps
    if step % config.training.log_every == 0 or last:
        log(trainer)
    if _due(step, config.checkpoints.snapshots_every) or (last and config.checkpoints.snapshots_every):
        save_snapshots(trainer)
    if preview is not None and _due(step, config.training.sample_every):
        with trainer.logbook.paused():
            preview.save(trainer)
    if evaluator is not None and _due(step, config.evaluation.every):
        read_checks(trainer, lag=0)
        with trainer.logbook.paused():
            trainer.logbook.write_scores(step, evaluator(step, lambda name: full_weights(trainer, name)))
    if _due(step, config.checkpoints.every) or last:
        save(trainer)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _end_if_asked(trainer: Trainer, stop: StopFlag) -> None:
    """Saves and raises StoppedError when the ranks agree that one of them was asked to stop."""
    if trainer.saver.failed and stop.reason is None:
        stop.reason = "a checkpoint could not be written"
    if not stop.agreed(trainer.processes):
        return
    stop.drain(trainer.processes)
    trainer.processes.raise_together(_failed_write(trainer))
    if trainer.step > trainer.saved_step:
        save(trainer)
    finish_saving(trainer)
    reasons = [r for r in trainer.processes.gather(stop.reason) if r and not r.startswith("another")]
    raise StoppedError(
        f"stopped by {reasons[0] if reasons else stop.reason} at step {trainer.step}; saved, start again to go on"
    )


def _failed_write(trainer: Trainer) -> UserError | None:
    if not trainer.saver.failed:
        return None
    try:
        trainer.saver.wait()
    except UserError as error:
        return error
    return None


def _batches(trainer: Trainer) -> Generator[list[Share], None, None]:
    """This process's shares of every coming step, in order."""
    config, processes = trainer.config, trainer.processes
    training, size = config.training, len(trainer.dataset)
    mine = batch_order.partition(training.batch_size, processes.rank, processes.world_size)
    pieces = [torch.arange(p.start, p.stop) for p in batch_order.micro_batches(mine, training.micro_batch_size)]

    def indices() -> Iterator[Tensor]:
        for step in range(trainer.step, training.steps):
            for positions in pieces:
                yield batch_order.batch_indices(config.seed, step, positions, training.batch_size, size)

    keys, images = indices(), trainer.dataset.stream(indices())
    try:
        for _ in range(trainer.step, training.steps):
            yield [Share(positions, next(keys), next(images)) for positions in pieces]
    finally:
        if hasattr(images, "close"):  # a cached data set has no workers to end
            images.close()


def log(trainer: Trainer) -> None:
    """One row: means since the last row, and how far each copy is from raw (relative L2). A collective.

    A row at the last step that lies between two rows is marked `partial`: its steps stay in the window that a checkpoint
    carries, and a longer run that goes on from there drops the row and counts them in the next one.
    """
    read_checks(trainer, lag=0)
    processes, step = trainer.processes, trainer.step
    row: dict[str, Any] = dict(trainer.window.means(processes))
    if step % trainer.config.training.log_every:
        row["partial"] = True
    else:
        trainer.window.clear()
    row["learning_rate"] = trainer.config.training.learning_rate_at(step - 1)
    row["skipped_steps"] = trainer.skipped_steps
    squares = trainer.bank.squared_distances()
    sums = torch.stack([*squares.values(), trainer.bank.squared_norm()]).cpu().double()
    if trainer.split:
        processes.sum_(sums)
    for (name, profile), square in zip(trainer.bank.profiles.items(), sums[:-1], strict=True):
        row[f"decay/{name}"] = profile.decay(step)
        row[f"distance/{name}"] = math.sqrt(square.item() / sums[-1].item())
    trainer.logbook.write(step, row)


@contextlib.contextmanager
def _locked(rundir: RunDir, processes: Processes) -> Iterator[None]:
    """Rank 0 holds the run directory; its refusal is everyone's."""
    with contextlib.ExitStack() as stack:
        error = None
        if processes.is_main:
            try:
                stack.enter_context(rundir.lock())
            except UserError as caught:
                error = caught
        processes.raise_together(error)
        yield


def _where_to_go_on(config: Config, rundir: RunDir, processes: Processes) -> dict[str, Any] | None:
    """The manifest of the checkpoint to go on from, on every rank."""
    found, error = None, None
    if processes.is_main:
        try:
            checkpoint = find_checkpoint(config, rundir, processes)
            found = checkpoint.manifest if checkpoint else None
        except UserError as caught:
            error = caught
    processes.raise_together(error)
    return processes.broadcast(found)


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
