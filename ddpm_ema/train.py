"""The trainer: `build` puts a run together, `train_step` is one optimizer step, `run` goes from where the folder stands to the end.

Everything random is a function of (seed, step, position in the global batch), so there is no random state to save, and one
process, eight, or micro-batches of one image see the same numbers (docs/training.md has the exact guarantees).
"""

from __future__ import annotations

import collections
import contextlib
import math
import shutil
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.nn.utils.clip_grad import clip_grads_with_norm_

from ddpm_ema import data, diffusion, model, optimization, sampling, streams
from ddpm_ema.averaging import AverageBank, profile_to_dict
from ddpm_ema.averaging.posthoc import write_snapshot
from ddpm_ema.config import Config, to_yaml
from ddpm_ema.errors import DivergedError, StoppedError, UserError
from ddpm_ema.grids import save_grid
from ddpm_ema.logbook import Logbook, Window
from ddpm_ema.processes import Processes, StopFlag, say
from ddpm_ema.rundir import RunDir, atomic_write, step_folder
from ddpm_ema.saving import Saver, check_dataset, find_checkpoint, host_copy, manifest_of
from ddpm_ema.streams import Stream

Weights: TypeAlias = Callable[[str], dict[str, Tensor]]
"""`weights(name)`: full fp32 weights by parameter name, on every rank. A collective."""
Evaluator: TypeAlias = Callable[[int, Weights], list[dict[str, Any]]]
MakeEvaluator: TypeAlias = Callable[[Config, Processes, Any], Evaluator]

# How many steps late a CUDA run reads whether a step was finite, so that the host need not wait for the device.
# Nothing is saved, sampled, logged or counted as done before it was read.
CUDA_CHECK_LAG = 2
PREVIEW_STEPS = 50
WEIGHTING_POINTS = 200


@dataclass
class Trainer:
    """What one process of a run works with. `step` counts completed optimizer steps."""

    config: Config
    processes: Processes
    rundir: RunDir
    dataset: Any
    objective: diffusion.Objective
    network: nn.Module  # the U-Net, whose parameters have the names that files use
    wrapped: nn.Module  # the same, inside DDP when there are several processes
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    bank: AverageBank
    window: Window
    logbook: Logbook
    saver: Saver
    step: int = 0
    saved_step: int = 0
    skipped_steps: int = 0
    unread: collections.deque[FinitenessCheck] = field(default_factory=collections.deque)
    preview: Preview | None = None
    evaluator: Evaluator | None = None

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.network.named_parameters())


@dataclass
class Share:
    """One micro-batch: which part of the global batch, and its images."""

    positions: Tensor  # int64 [n], in the global batch
    indices: Tensor  # int64 [n], in the data set
    images: Tensor  # uint8 [n, C, H, W]


@dataclass
class FinitenessCheck:
    """What must be known of a step before anything of it is kept."""

    step: int
    grad_norm: Tensor
    losses: list[tuple[Share, Tensor]]


def run(config: Config, evaluate: MakeEvaluator | None = None) -> None:
    """Trains to `training.steps`, from where `output_dir` stands. Raises UserError, DivergedError or StoppedError."""
    training = config.training
    check_capabilities(config)
    processes = Processes.start(
        training.device,
        timeout=training.timeout,
        expected=training.world_size,
        trackers=training.trackers,
        project_dir=config.output_dir,
    )
    rundir = RunDir(config.output_dir)
    with StopFlag() as stop, _locked(rundir, processes):
        checkpoint = _where_to_go_on(config, rundir, processes)
        if checkpoint is not None and checkpoint["step"] >= training.steps:
            _say(processes, f"{rundir.path}: already complete at step {checkpoint['step']}; nothing to do")
        else:
            trainer = build(config, processes, rundir)
            with processes.naming_lost_ranks("training"), _memory_advice(trainer):
                restore(trainer, checkpoint)
                loop(trainer, stop, evaluate)
    processes.close()


def build(config: Config, processes: Processes, rundir: RunDir) -> Trainer:
    """Network, objective, optimizer and averages of a run at step 0."""
    training, device = config.training, processes.device
    dataset = processes.main_first(lambda: data.load(config.data))
    _require_enough(dataset, config, processes)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = training.tf32
    network = model.build(config, dataset.num_classes).to(device)
    if training.channels_last:
        network = network.to(memory_format=torch.channels_last)
    if training.compile:
        network.compile()  # in place: parameter names stay what they are
    world = processes.world_size
    split = world > 1 and training.split_averages is not False
    bank = AverageBank(
        network.named_parameters(),
        config.averages,
        rank=processes.rank if split else 0,
        world_size=world if split else 1,
    )
    trainer = Trainer(
        config=config,
        processes=processes,
        rundir=rundir,
        dataset=dataset.to(device) if config.data.storage == "device" else dataset,
        objective=diffusion.Objective(config.diffusion).to(device),
        network=network,
        wrapped=processes.accelerator.prepare_model(network),
        optimizer=optimization.build_optimizer(network.parameters(), training),
        scaler=torch.amp.GradScaler(device.type, enabled=training.mixed_precision == "fp16"),
        bank=bank,
        window=Window(device, config.diffusion.num_train_timesteps),
        logbook=Logbook(rundir, processes, training.steps, training.batch_size),
        saver=Saver(rundir),
    )
    _say(processes, describe(trainer))
    return trainer


def train_step(trainer: Trainer, shares: list[Share]) -> bool:
    """One optimizer step over this process's shares of the global batch. False where fp16 overflowed and nothing moved.

    The loss is the mean over the global batch, whatever the number of processes and micro-batches: each process adds
    up its images' losses divided by the global batch size, and DDP's mean over processes is undone by their number.
    """
    training, optimizer = trainer.config.training, trainer.optimizer
    optimization.set_learning_rate(optimizer, optimization.learning_rate(trainer.step, training))
    scale = trainer.processes.world_size / training.batch_size
    losses: list[tuple[Share, Tensor]] = []
    for number, share in enumerate(shares, start=1):
        with contextlib.nullcontext() if number == len(shares) else _no_sync(trainer.wrapped):
            loss, timesteps = image_losses(trainer, share)
            trainer.scaler.scale(loss.sum() * scale).backward()
        losses.append((share, loss.detach()))
        trainer.window.add_losses(loss, timesteps)
    trainer.scaler.unscale_(optimizer)
    grad_norm = _clip(trainer)
    trainer.unread.append(FinitenessCheck(trainer.step, grad_norm, losses))
    moved = _step_optimizer(trainer)
    optimizer.zero_grad(set_to_none=True)
    if moved:
        trainer.step += 1
        trainer.bank.update(trainer.step)
        trainer.window.add_step(grad_norm)
    return moved


def image_losses(trainer: Trainer, share: Share) -> tuple[Tensor, Tensor]:
    """(loss of every image, fp32 [n]; timesteps, int64 [n]) of one micro-batch, by the keys (seed, step, position)."""
    config, objective, device = trainer.config, trainer.objective, trainer.processes.device
    seed, step, positions = config.seed, trainer.step, share.positions
    if config.model.dropout > 0:
        torch.manual_seed(streams.seed_for(seed, Stream.DROPOUT, step, int(positions[0])))
    positions = positions.to(device, non_blocking=True)
    x_0 = normalise(share.images.to(device, non_blocking=True))  # fp32 [n, C, H, W] in [-1, 1]
    if config.data.horizontal_flip:
        flipped = streams.uniform(seed, Stream.FLIP, step, positions) < 0.5  # bool [n]
        x_0 = torch.where(flipped[:, None, None, None], x_0.flip(-1), x_0)
    noise = streams.normal(seed, Stream.NOISE, step, positions, tuple(x_0.shape[1:]))
    timesteps = objective.timesteps(seed, step, positions)
    labels = None
    if config.model.class_conditional:
        known = trainer.dataset.labels[share.indices].to(device)
        labels = objective.drop_labels(known, model.no_label(trainer.network), seed, step, positions)
    return objective.loss(_predictor(trainer), x_0, noise, timesteps, labels), timesteps


def normalise(images: Tensor) -> Tensor:
    """uint8 [n, C, H, W] -> fp32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def loop(trainer: Trainer, stop: StopFlag, evaluate: MakeEvaluator | None) -> None:
    """Steps until `training.steps`, or until any rank is asked to stop."""
    config, processes, logbook = trainer.config, trainer.processes, trainer.logbook
    if evaluate is not None and config.evaluation.every:
        trainer.evaluator = evaluate(config, processes, trainer.dataset)
    batches = _batches(trainer)
    logbook.start(trainer.step)
    try:
        while trainer.step < config.training.steps:
            _end_if_asked(trainer, stop)
            with logbook.timed("data_wait"):
                shares = next(batches)
            while not train_step(trainer, shares):
                _note_skipped_step(trainer)
            read_checks(trainer, lag=CUDA_CHECK_LAG if processes.device.type == "cuda" else 0)
            logbook.tick()
            _at_intervals(trainer)
        stop.drain(processes)
        if trainer.saved_step != trainer.step:
            save(trainer)
        finish_saving(trainer)
    finally:
        logbook.close()
        trainer.saver.close()
    _say(processes, f"{trainer.rundir.path}: complete at step {trainer.step}")


def _at_intervals(trainer: Trainer) -> None:
    """What is due after the step just completed."""
    config, step = trainer.config, trainer.step
    last = step == config.training.steps
    if step % config.training.log_every == 0 or last:
        log(trainer)
    if _due(step, config.checkpoints.snapshots_every):
        save_snapshots(trainer)
    if _due(step, config.training.sample_every):
        save_preview(trainer)
    if trainer.evaluator is not None and _due(step, config.evaluation.every):
        read_checks(trainer, lag=0)
        with trainer.logbook.paused():
            trainer.logbook.write_scores(step, trainer.evaluator(step, lambda name: full_weights(trainer, name)))
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


def _batches(trainer: Trainer) -> Iterator[list[Share]]:
    """This process's shares of every coming step, in order."""
    config, processes = trainer.config, trainer.processes
    training, size = config.training, len(trainer.dataset)
    mine = streams.partition(training.batch_size, processes.rank, processes.world_size)
    pieces = [torch.arange(p.start, p.stop) for p in streams.micro_batches(mine, training.micro_batch_size)]

    def indices() -> Iterator[Tensor]:
        for step in range(trainer.step, training.steps):
            for positions in pieces:
                yield streams.batch_indices(config.seed, step, positions, training.batch_size, size)

    keys, images = indices(), trainer.dataset.stream(indices())
    for _ in range(trainer.step, training.steps):
        yield [Share(positions, next(keys), next(images)) for positions in pieces]


def _predictor(trainer: Trainer) -> diffusion.Predict:
    """The network inside autocast. Its input keeps the memory order that its weights have."""
    precision, device = trainer.config.training.mixed_precision, trainer.processes.device.type
    dtype = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    order = torch.channels_last if trainer.config.training.channels_last else torch.contiguous_format

    def predict(x_t: Tensor, timesteps: Tensor, labels: Tensor | None) -> Tensor:
        with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
            x_t = x_t.contiguous(memory_format=order)
            return trainer.wrapped(x_t, timesteps, class_labels=labels, return_dict=False)[0]

    return predict


def _no_sync(wrapped: nn.Module) -> contextlib.AbstractContextManager[None]:
    return wrapped.no_sync() if hasattr(wrapped, "no_sync") else contextlib.nullcontext()


def _clip(trainer: Trainer) -> Tensor:
    """Global gradient norm before clipping, a 0-d tensor; the same on every rank, since gradients are."""
    parameters = [p for p in trainer.network.parameters() if p.grad is not None]
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    if (limit := trainer.config.training.gradient_clip) is not None:
        clip_grads_with_norm_(parameters, limit, norm)
    return norm


def _step_optimizer(trainer: Trainer) -> bool:
    """False where fp16 scaling found an overflow: the optimizer did not move, and neither may an average."""
    scaler = trainer.scaler
    if not scaler.is_enabled():
        if trainer.processes.device.type == "cpu":
            read_checks(trainer, lag=0)
        trainer.optimizer.step()
        return True
    before = scaler.get_scale()
    scaler.step(trainer.optimizer)
    scaler.update()
    moved = scaler.get_scale() >= before
    if not moved:
        trainer.unread.pop()
    return moved


def _note_skipped_step(trainer: Trainer) -> None:
    """A skipped step is tried again with the same images and noise at a smaller scale, so the stream is not disturbed."""
    trainer.skipped_steps += 1
    in_a_row = trainer.skipped_in_a_row = getattr(trainer, "skipped_in_a_row", 0) + 1
    if in_a_row > trainer.config.training.max_skipped:
        raise DivergedError(
            f"step {trainer.step}: fp16 gradients overflowed {in_a_row} times in a row (training.max_skipped); "
            f"{_last_checkpoint(trainer)}. Use bf16 or a lower learning rate"
        )


def read_checks(trainer: Trainer, lag: int) -> None:
    """Raises DivergedError on every rank where a step older than `lag` steps had a loss or gradient that is not finite."""
    while len(trainer.unread) > lag:
        check = trainer.unread.popleft()
        if not math.isfinite(check.grad_norm.item()):
            raise DivergedError(_why_diverged(trainer, check))


def _why_diverged(trainer: Trainer, check: FinitenessCheck) -> str:
    mine = [
        (trainer.processes.rank, share.indices[~torch.isfinite(loss).cpu()].tolist()) for share, loss in check.losses
    ]
    found = [(rank, images) for part in trainer.processes.gather(mine) for rank, images in part if images]
    where = "; ".join(f"rank {rank}: the loss of image {', '.join(map(str, images[:8]))}" for rank, images in found)
    return (
        f"step {check.step + 1}: {where + ' is not finite' if found else 'the gradient is not finite, though every loss is'}"
        f" (gradient norm {check.grad_norm.item()}). Optimizer, averages and files are as before this step; "
        f"{_last_checkpoint(trainer)}. Try a lower learning rate, warm-up or gradient clipping"
    )


def _last_checkpoint(trainer: Trainer) -> str:
    return f"last checkpoint: step {trainer.saved_step}" if trainer.saved_step else "no checkpoint yet"


def log(trainer: Trainer) -> None:
    """One row: means since the last row, and how far each copy is from raw (relative L2). A collective."""
    read_checks(trainer, lag=0)
    processes, step = trainer.processes, trainer.step
    row: dict[str, Any] = trainer.window.take(processes)
    row["learning_rate"] = optimization.learning_rate(step - 1, trainer.config.training)
    row["skipped_steps"] = trainer.skipped_steps
    squares = trainer.bank.squared_distances()
    sums = torch.stack([*squares.values(), trainer.bank.squared_norm()]).cpu().double()
    if trainer.bank.world_size > 1:
        processes.sum_(sums)
    for (name, profile), square in zip(trainer.bank.profiles.items(), sums[:-1], strict=True):
        row[f"decay/{name}"] = profile.decay(step)
        row[f"distance/{name}"] = math.sqrt(square.item() / sums[-1].item())
    trainer.logbook.write(step, row)


def full_weights(trainer: Trainer, name: str) -> dict[str, Tensor]:
    """The fp32 weights of one copy, whole, on every rank. A collective when the averages are split."""
    if name == "raw":
        return {k: v.detach().float() for k, v in trainer.network.state_dict().items()}
    return trainer.bank.gather_all(name)


def save(trainer: Trainer) -> None:
    """Copies the whole state to rank 0's memory and hands it to the writer. A collective; waits for an earlier write."""
    read_checks(trainer, lag=0)
    config, processes, bank, step = trainer.config, trainer.processes, trainer.bank, trainer.step
    with trainer.logbook.timed("save_seconds"):
        _wait_for_writer(trainer)
        files: dict[str, dict[str, Tensor]] = {}
        for name in bank.profiles:  # every rank takes part; only rank 0 receives
            files[f"averages/{name}.safetensors"] = {k: v.clone() for k, v in bank.gather(name)}
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
            window=window,
            skipped_steps=trainer.skipped_steps,
            scaler=trainer.scaler.state_dict(),
            weightings={name: weighting_points(profile, step) for name, profile in bank.profiles.items()},
        )
        trainer.saver.submit(lambda: _write(trainer.rundir, step, files, manifest, config))


def _write(rundir: RunDir, step: int, files: dict[str, dict[str, Tensor]], manifest: dict[str, Any], config: Config) -> None:
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


def weighting_points(profile: Any, step: int) -> list[float]:
    """The profile's weighting of the steps so far as a density over [0, 1] at 200 points, for the report."""
    weighting = torch.from_numpy(profile.weighting(step))
    bins = (torch.arange(step) * WEIGHTING_POINTS) // step
    density = torch.zeros(WEIGHTING_POINTS, dtype=torch.float64).index_add_(0, bins, weighting)
    return (density * WEIGHTING_POINTS).tolist()


def save_snapshots(trainer: Trainer) -> None:
    """Stores the power-function averages for post-hoc reconstruction. A collective."""
    read_checks(trainer, lag=0)
    config, step, rundir = trainer.config, trainer.step, trainer.rundir
    dtype = getattr(torch, config.checkpoints.snapshot_dtype)
    with trainer.logbook.timed("save_seconds"):
        _wait_for_writer(trainer)
        for name, profile in trainer.bank.profiles.items():
            if profile.kind != "power_function":
                continue
            tensors = {k: v.to(dtype, copy=True) for k, v in trainer.bank.gather(name)}
            if trainer.processes.is_main:
                trainer.saver.submit(
                    lambda name=name, profile=profile, tensors=tensors: rundir.write_snapshot(
                        step, name, lambda path: write_snapshot(path, tensors, step, profile, dtype)
                    )
                )


class Preview:
    """A sampling model of its own, for grids while training: the training model's weights are never swapped."""

    def __init__(self, trainer: Trainer) -> None:
        config = trainer.config
        self.network = model.build(config, trainer.dataset.num_classes).to(trainer.processes.device).eval()
        settings = config.evaluation.model_copy(
            update={
                "sampler": "ddim",
                "eta": 0.0,
                "num_inference_steps": min(PREVIEW_STEPS, config.diffusion.num_train_timesteps),
            }
        )
        self.sampler = sampling.Sampler(diffusion.noise_scheduler(config.diffusion).config, settings)

    @torch.inference_mode()
    def images(self, trainer: Trainer, weights: dict[str, Tensor]) -> Tensor:
        """uint8 [n, C, H, W] on the CPU: every process samples its share."""
        config, processes = trainer.config, trainer.processes
        self.network.load_state_dict(weights)
        mine = streams.partition(config.training.sample_images, processes.rank, processes.world_size)
        indices = torch.arange(mine.start, mine.stop)
        labels = None
        if config.model.class_conditional:
            labels = indices % model.no_label(self.network)
        images = sampling.sample(
            lambda x, t, c: self.network(x, t, class_labels=c, return_dict=False)[0],
            self.sampler,
            seed=config.evaluation.seed,
            indices=indices,
            image_shape=trainer.dataset.image_shape,
            device=processes.device,
            labels=labels,
        )
        return torch.cat(processes.gather(images.cpu()))


def save_preview(trainer: Trainer) -> None:
    """A grid: raw and every copy, same noise, one labelled row each. A collective."""
    read_checks(trainer, lag=0)
    with trainer.logbook.paused():
        trainer.preview = trainer.preview or Preview(trainer)
        names = ["raw", *trainer.bank.profiles]
        rows = {name: trainer.preview.images(trainer, full_weights(trainer, name)) for name in names}
        if trainer.processes.is_main:
            save_grid(trainer.rundir.sample_grid(trainer.step), rows, f"step {trainer.step}, the same noise in every row")


def restore(trainer: Trainer, manifest: dict[str, Any] | None) -> None:
    """Brings every rank to the state of a checkpoint, whose files only rank 0 reads. A collective."""
    processes, config = trainer.processes, trainer.config
    if manifest is None:
        if processes.is_main:
            atomic_write(trainer.rundir.config_path, to_yaml(config))
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
        _say(processes, f"going on from {trainer.rundir.path / 'checkpoints' / step_folder(step)}")
    trainer.logbook.start_trackers(config.training.trackers, config.model_dump(mode="json"))


def describe(trainer: Trainer) -> str:
    """What a person should see before the first step."""
    config, processes, bank = trainer.config, trainer.processes, trainer.bank
    count = sum(p.numel() for p in trainer.network.parameters())
    world, batch = processes.world_size, config.training.batch_size
    dataset = trainer.dataset
    precision = {"no": "fp32"}.get(config.training.mixed_precision, config.training.mixed_precision)
    split = f", each process keeps 1/{bank.world_size}" if bank.world_size > 1 else ""
    lines = [
        f"device       {processes.device}, {precision}{', compiled' if config.training.compile else ''}",
        f"processes    {world}",
        f"global batch {batch} images ({', '.join(str(len(streams.partition(batch, r, world))) for r in range(world))} a process)",
        f"data         {dataset.name}: {len(dataset)} images {tuple(dataset.image_shape)}",
        f"parameters   {count:,}",
        f"averages     {len(bank.profiles)} ({', '.join(bank.profiles) or 'none'}): {bank.num_bytes / 2**20:.1f} MiB here{split}",
        f"output       {trainer.rundir.path}",
    ]
    return "\n".join(lines)


def check_capabilities(config: Config) -> None:
    """Raises UserError for what this machine cannot do, before any data is read."""
    training = config.training
    on_cuda = training.device != "cpu" and torch.cuda.is_available()
    if training.mixed_precision == "bf16" and on_cuda and not torch.cuda.is_bf16_supported():
        raise UserError("training.mixed_precision: this GPU has no bf16; use fp16 or no")
    if training.compile and not on_cuda and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise UserError("training.compile: torch.compile needs a C++ compiler on CPU, and there is no g++ here; set it to false")
    names = [name for name in training.trackers if name not in _known_trackers()]
    if names:
        raise UserError(f"training.trackers: {', '.join(names)} unknown; accelerate knows {', '.join(_known_trackers())}")


def _known_trackers() -> list[str]:
    from accelerate.utils import LoggerType

    return [str(kind.value) for kind in LoggerType]


def _require_enough(dataset: Any, config: Config, processes: Processes) -> None:
    batch = config.training.batch_size
    if len(dataset) < batch:
        raise UserError(f"data: {dataset.name} has {len(dataset)} images, fewer than one batch (training.batch_size {batch})")
    if batch < processes.world_size:
        raise UserError(f"training.batch_size: {batch} images cannot be shared by {processes.world_size} processes")


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
            f"training.micro_batch_size (it does not change the result); {_last_checkpoint(trainer)}"
        ) from None


def _say(processes: Processes, message: str) -> None:
    if processes.is_main:
        say(message)
