"""What one process of a run works with: network, data, objective, optimizer, averages; and how it is built."""

import collections
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from accelerate.utils import LoggerType
from torch import Tensor, nn

from ddpm_ema import batch_order, capabilities, data, diffusion, model, network_call
from ddpm_ema.averaging.bank import AverageBank
from ddpm_ema.averaging.summary import summarize
from ddpm_ema.config import Config
from ddpm_ema.distributed import Processes
from ddpm_ema.errors import UserError
from ddpm_ema.features.extractor import missing
from ddpm_ema.messages import logger
from ddpm_ema.rundir import RunDir
from ddpm_ema.train import first_lines
from ddpm_ema.train.background import BackgroundWriter
from ddpm_ema.train.metrics_log import MetricsLog, RunningMeans
from ddpm_ema.train.optimizer import build_optimizer

Weights: TypeAlias = Callable[[str], dict[str, Tensor]]
"""`weights(name)`: full fp32 weights by parameter name, on every rank. A collective."""
Evaluator: TypeAlias = Callable[[int, Weights], list[dict[str, Any]]]
MakeEvaluator: TypeAlias = Callable[[Config, Processes, Any], Evaluator]


@dataclass
class MicroBatch:
    """Images of one process that go through the network at once."""

    positions: Tensor  # int64 [n], in the global batch
    indices: Tensor  # int64 [n], in the data set
    images: Tensor  # uint8 [n, C, H, W]


@dataclass
class FinitenessCheck:
    """Losses and gradient norm of one step, checked for NaN and infinity before the step is saved or logged."""

    step: int
    grad_norm: Tensor  # on the host,
    has_arrived: Callable[[], bool]  # once this is true
    losses: list[tuple[MicroBatch, Tensor]]  # fp32 [n], one per image


@dataclass
class Trainer:
    """What one process of a run works with. `step` counts completed optimizer steps."""

    config: Config
    processes: Processes
    rundir: RunDir
    dataset: Any
    objective: diffusion.Objective
    network: nn.Module  # the U-Net, whose parameters have the names that files use
    ddp_network: nn.Module  # the same, inside DDP when there are several processes
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    bank: AverageBank
    split: bool  # whether each process keeps only its part of the averages
    means: RunningMeans
    metrics_log: MetricsLog
    writer: BackgroundWriter
    step: int = 0
    saved_step: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    pending_checks: collections.deque[FinitenessCheck] = field(default_factory=collections.deque)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """By every name, also the further ones of a tied parameter."""
        return dict(self.network.named_parameters(remove_duplicate=False))

    def buffers(self, name: str) -> dict[str, Tensor]:
        """The buffers that files hold, of `raw` or an average as it is followed; a U-Net has none."""
        known, parameters = self.network.state_dict(), self.parameters
        buffers = known if name == "raw" else self.bank.buffers(name)
        return {n: buffers[n] for n in known if n in buffers and n not in parameters}


def build(config: Config, processes: Processes, rundir: RunDir) -> Trainer:
    """Network, objective, optimizer and averages of a run at step 0."""
    training, device = config.training, processes.device
    dataset = processes.main_first(lambda: data.load(config.data), "reading the images")
    _require_enough(dataset, config, processes)
    _require_same_data(dataset, processes)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.machine.tf32
    network = model.build(config, dataset.num_classes).to(device)
    if training.channels_last:
        network_call.channels_last(network)
    if training.compile:
        network.compile()  # in place: parameter names stay what they are
    world = processes.world_size
    split = world > 1 and training.split_averages is not False
    rank, parts = (processes.rank, world) if split else (0, 1)
    bank = AverageBank(network, config.averages, rank=rank, world_size=parts)
    trainer = Trainer(
        config=config,
        processes=processes,
        rundir=rundir,
        dataset=dataset.to(device),
        objective=diffusion.Objective(config.diffusion).to(device),
        network=network,
        ddp_network=processes.accelerator.prepare_model(network),
        optimizer=build_optimizer(network.parameters(), training),
        scaler=torch.amp.GradScaler(device.type, enabled=training.mixed_precision == "fp16"),
        bank=bank,
        split=split,
        means=RunningMeans(device, config.diffusion.num_train_timesteps),
        metrics_log=MetricsLog(rundir, processes, training.steps, training.batch_size),
        writer=BackgroundWriter(),
    )
    if processes.is_main:
        logger.info(describe(trainer))
        for warning in warnings_before(config, dataset):
            logger.warning(warning)
    return trainer


def describe(trainer: Trainer) -> str:
    """What a person should see before the first step."""
    config, processes, bank = trainer.config, trainer.processes, trainer.bank
    count = sum(p.numel() for p in trainer.network.parameters())
    world, batch, dataset = processes.world_size, config.training.batch_size, trainer.dataset
    shares = [len(batch_order.partition(batch, rank, world)) for rank in range(world)]
    precision = {"no": "fp32"}.get(config.training.mixed_precision, config.training.mixed_precision)
    split = f", each process keeps 1/{world}" if trainer.split else ""
    threads = f" ({torch.get_num_threads()} of {os.cpu_count()} cores)" if processes.device.type == "cpu" else ""
    lines = [
        f"version      {first_lines.version()}",
        f"device       {processes.device}{threads}, {precision}{', compiled' if config.training.compile else ''}",
        f"processes    {world}",
        f"seed         {config.seed}",
        f"global batch {batch} images ({', '.join(map(str, shares))} per process)",
        f"data         {dataset}",
        f"parameters   {count:,}",
        f"averages     {len(bank.profiles)} ({', '.join(bank.profiles) or 'none'}): {bank.num_bytes / 2**20:.1f} MiB here{split}",
        f"output       {trainer.rundir.path}",
        f"intervals    {first_lines.intervals(config)}",
        *summarize(bank.profiles, config.training.steps),
    ]
    return "\n".join(lines)


def warnings_before(config: Config, dataset: Any) -> Iterator[str]:
    """What a person would rather know before training than after: void intervals, skipped images, what scoring will lack."""
    training, checkpoints = config.training, config.checkpoints
    void = {
        "training.sample_every": (training.sample_every, "there will be no sample grid"),
        "checkpoints.every": (checkpoints.every, "the only checkpoint will be that of the last step"),
        "checkpoints.snapshots_every": (checkpoints.snapshots_every, "no other average can be reconstructed"),
        "evaluation.every": (config.evaluation.every, "nothing will be scored while training"),
        "training.warmup_steps": (training.warmup_steps, "the learning rate will not reach its peak"),
    }
    for key, (steps, consequence) in void.items():
        if steps > training.steps:
            yield f"{key}: {steps:,} is more than training.steps, {training.steps:,}: {consequence}"
    for line in dataset.skipped:
        yield f"skipped image: {line}"
    yield from filter(None, (missing(entry, config.output_dir) for entry in config.evaluation.extractors))


def check_capabilities(config: Config) -> None:
    """Raises UserError for what this machine cannot do, before any data is read."""
    capabilities.check("training", config.training, config.machine)
    known = [str(kind.value) for kind in LoggerType]
    if names := [name for name in config.training.trackers if name not in known]:
        raise UserError(f"training.trackers: {', '.join(names)} unknown; accelerate knows {', '.join(known)}")


def _require_enough(dataset: Any, config: Config, processes: Processes) -> None:
    batch = config.training.batch_size
    if len(dataset) < batch:
        raise UserError(
            f"data: {dataset.name} has {len(dataset)} images, fewer than one batch (training.batch_size {batch})"
        )
    if batch < processes.world_size:
        raise UserError(f"training.batch_size: {batch} images cannot be shared by {processes.world_size} processes")


def _require_same_data(dataset: Any, processes: Processes) -> None:
    """Raises UserError where ranks see other images: each node reads its own folder."""
    found = processes.gather((len(dataset), dataset.fingerprint, socket.gethostname()))
    if len({(size, fingerprint) for size, fingerprint, _ in found}) > 1:
        lines = [
            f"  rank {rank} on {host}: {size:,} images, fingerprint {fingerprint[:12]}"
            for rank, (size, fingerprint, host) in enumerate(found)
        ]
        told = "data: the ranks do not read the same images; copy one folder to every node"
        raise UserError("\n".join([told, *lines]))
