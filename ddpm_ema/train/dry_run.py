"""`ddpm-ema train --dry-run`: what a run would take, measured on a few steps and otherwise computed; nothing is written."""

import itertools
import time
from collections.abc import Iterator

import torch

from ddpm_ema.config import Config, to_yaml
from ddpm_ema.distributed import Processes
from ddpm_ema.messages import clock, logger
from ddpm_ema.numbers import aligned
from ddpm_ema.rundir import RunDir
from ddpm_ema.train.loop import batches_of
from ddpm_ema.train.step import train_step
from ddpm_ema.train.trainer import Trainer, build, check_capabilities

MIB = 2**20
SPLIT_OVER = (2, 8)  # processes, for the table of memory


def dry_run(config: Config) -> None:
    """Prints the resolved settings as YAML on stdout, and on stderr what a run of them takes; the run directory stays as it is.

    Raises:
        UserError: what would end the run before its first step.
    """
    check_capabilities(config)
    machine = config.machine
    processes = Processes.start(machine.device, timeout=machine.timeout, expected=machine.world_size)
    with processes.telling_peers():
        trainer = build(config, processes, RunDir(config.output_dir))
        if processes.is_main:
            logger.info("measuring three steps")
        seconds = time_steps(trainer)
        trainer.writer.close()
    if processes.is_main:
        logger.info("\n".join(cost(trainer, seconds)))
        print(to_yaml(config), end="")
    processes.close()


def time_steps(trainer: Trainer) -> float:
    """Seconds per optimizer step: a mean over two steps after one that warms up (and compiles), if the run has so many."""
    batches = list(itertools.islice(batches_of(trainer), 3))
    ends = [time.perf_counter()]
    for micro_batches in batches:
        train_step(trainer, micro_batches)
        if trainer.processes.device.type == "cuda":
            torch.cuda.synchronize()
        ends.append(time.perf_counter())
    measured = ends[1:] if len(ends) > 2 else ends
    return (measured[-1] - measured[0]) / (len(measured) - 1)


def cost(trainer: Trainer, seconds: float) -> Iterator[str]:
    """Lines: time, disk and memory of the whole run at `seconds` per optimizer step."""
    config, checkpoints = trainer.config, trainer.config.checkpoints
    steps, batch = config.training.steps, config.training.batch_size
    epoch = len(trainer.dataset) / batch
    weights = 4 * sum(parameter.numel() for parameter in trainer.network.parameters())
    saved = (3 + len(config.averages)) * weights
    yield f"step         {seconds:.3g} s here (two steps), {batch / seconds:,.1f} images/s"
    yield f"run          {length(steps, seconds)}"
    yield f"epoch        {epoch:,.1f} steps; the run sees each image {steps / epoch:,.1f} times"
    written = [*range(checkpoints.every, steps, checkpoints.every), steps]
    kept = len({*written[-checkpoints.keep :], *(s for s in written if s % (checkpoints.keep_every or steps + 1) == 0)})
    yield f"checkpoint   {saved / MIB:,.1f} MiB (raw, two moments, {len(config.averages)} averages); {kept} kept at the end"
    if checkpoints.snapshots_every:
        size = weights // (2 if checkpoints.snapshot_dtype == "bfloat16" else 1)
        times, names = -(-steps // checkpoints.snapshots_every), config.snapshot_names
        total = (times * len(names) + 1) * size / MIB
        each = f"{times} of {len(names)} averages and the first weights"
        yield f"snapshots    {total:,.1f} MiB: {each}, {size / MIB:,.1f} MiB each"
    yield "memory, without activations and images:"
    yield from aligned([("", "1 process", *(f"each of {n}" for n in SPLIT_OVER)), *_memory(config, weights)])


def length(steps: int, seconds: float) -> str:
    """How long the run takes, and how many steps an hour has where it is longer."""
    hour = f"; --training.steps {int(3600 / seconds)} takes an hour" if steps * seconds > 3600 > seconds else ""
    return f"{steps:,} steps, {clock(seconds * steps)} without saving and sampling{hour}"


def _memory(config: Config, weights: int) -> Iterator[tuple[str, ...]]:
    """MiB of weights, gradients and optimizer, which every process holds, and of each average, which are split over them."""

    def shares(size: int, split: bool) -> tuple[str, ...]:
        return tuple(f"{size / MIB / (count if split else 1):,.1f} MiB" for count in (1, *SPLIT_OVER))

    yield "weights and gradients", *shares(2 * weights, False)
    yield "optimizer", *shares(2 * weights, False)
    for name in config.averages:
        yield name, *shares(weights, config.training.split_averages is not False)
