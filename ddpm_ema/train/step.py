"""One optimizer step: micro-batches, the loss of every image, clipping, and the check that all of it is finite."""

import contextlib
import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ddpm_ema import keyed_random, model, network_call
from ddpm_ema.errors import DivergedError
from ddpm_ema.keyed_random import Purpose
from ddpm_ema.sampling_network import AUTOCAST
from ddpm_ema.train.trainer import FinitenessCheck, MicroBatch, Trainer
from ddpm_ema.transfer import to_host

# How many steps late a run reads whether a step was finite, by device; 0 is before the optimizer moves. On CUDA the norm is
# then on the host already, so that the device never runs dry. Whatever saves, samples, scores or logs reads all checks first.
CHECK_LAG = {"cpu": 0, "cuda": 2}


def train_step(trainer: Trainer, micro_batches: list[MicroBatch]) -> bool:
    """One optimizer step over this process's micro-batches. False where fp16 overflowed and nothing moved.

    The loss is the mean over the global batch, whatever the number of processes and micro-batches: each process adds
    up its images' losses divided by the global batch size, and DDP's mean over processes is undone by their number.
    """
    training, optimizer = trainer.config.training, trainer.optimizer
    for group in optimizer.param_groups:
        group["lr"] = training.learning_rate_at(trainer.step)
    scale = trainer.processes.world_size / training.batch_size
    losses, timesteps = [], []
    for micro_batch in micro_batches:
        with _gradient_sync(trainer.ddp_network, last=micro_batch is micro_batches[-1]):
            loss, drawn = image_losses(trainer, micro_batch)
            whole = torch.where(loss.isfinite(), 1.0, torch.nan)  # every rank's gradient tells of an infinite loss
            trainer.scaler.scale((loss * whole).sum() * scale).backward()
        losses.append(loss.detach())
        timesteps.append(drawn)
    trainer.scaler.unscale_(optimizer)
    grad_norm = _clip(trainer)
    trainer.pending_checks.append(
        FinitenessCheck(trainer.step, *to_host(grad_norm), list(zip(micro_batches, losses, strict=True)))
    )
    moved = _step_optimizer(trainer)
    optimizer.zero_grad(set_to_none=True)
    if moved:
        trainer.step += 1
        trainer.skipped_in_a_row = 0
        trainer.bank.update(trainer.step)
        trainer.means.add_losses(torch.cat(losses), torch.cat(timesteps))
        trainer.means.add_step(grad_norm)
    return moved


def image_losses(trainer: Trainer, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """(loss of every image, fp32 [n]; timesteps, int64 [n]) of one micro-batch, by the keys (seed, step, position)."""
    config, objective = trainer.config, trainer.objective
    seed, step, positions = config.seed, trainer.step, micro_batch.positions
    if config.model.dropout > 0 or config.model.factory is not None:  # whose module may drop out as it likes
        torch.manual_seed(keyed_random.seed_for(seed, Purpose.DROPOUT, step, int(positions[0])))
    labels = None
    if (no_label := model.no_label(trainer.network)) is not None:
        labels = objective.drop_labels(trainer.dataset.labels[micro_batch.indices], no_label, seed, step, positions)
    inputs = objective.inputs(seed, step, positions, micro_batch.images, labels, config.data.horizontal_flip)
    return objective.loss(partial(_predict, trainer), *inputs), inputs[2]


def _predict(trainer: Trainer, x_t: Tensor, timesteps: Tensor, labels: Tensor | None) -> Tensor:
    """The network inside autocast. Its input keeps the memory order that its weights have."""
    training, dtype = trainer.config.training, AUTOCAST[trainer.config.training.mixed_precision]
    order = torch.channels_last if training.channels_last else torch.contiguous_format
    with torch.autocast(x_t.device.type, dtype=dtype, enabled=dtype is not None):
        return network_call.predict(trainer.ddp_network, x_t.contiguous(memory_format=order), timesteps, labels)


def _gradient_sync(network: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
    """Lets DDP add gradients up over the processes after the last micro-batch only."""
    if isinstance(network, DistributedDataParallel) and not last:
        return network.no_sync()
    return contextlib.nullcontext()


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
        if check_lag(trainer) == 0:
            read_checks(trainer, lag=0)
        trainer.optimizer.step()
        return True
    # Only the device knows whether fp16 overflowed, and the host must, to count the step or try it again.
    trainer.processes.wait_for_device(trainer.pending_checks[-1].has_arrived, "waiting for gradients")
    before = scaler.get_scale()
    scaler.step(trainer.optimizer)
    scaler.update()
    moved = scaler.get_scale() >= before
    if not moved:
        trainer.pending_checks.pop()
    return moved


def note_skipped_step(trainer: Trainer) -> None:
    """A skipped step is tried again with the same images and noise at a smaller scale, so the stream is not disturbed."""
    trainer.skipped_steps += 1
    trainer.skipped_in_a_row += 1
    if (in_a_row := trainer.skipped_in_a_row) > trainer.config.training.max_skipped:
        raise DivergedError(
            f"step {trainer.step}: fp16 gradients overflowed {in_a_row} times in a row (training.max_skipped); "
            f"{last_checkpoint(trainer)}. Use bf16 or a lower learning rate"
        )


def check_lag(trainer: Trainer) -> int:
    """How many steps late this run reads its checks."""
    return CHECK_LAG[trainer.processes.device.type]


def read_checks(trainer: Trainer, lag: int) -> None:
    """Raises DivergedError on every rank where a step older than `lag` steps had a loss or gradient that is not finite."""
    while len(trainer.pending_checks) > lag:
        check = trainer.pending_checks.popleft()
        trainer.processes.wait_for_device(check.has_arrived, f"waiting for step {check.step + 1}")
        if not math.isfinite(check.grad_norm.item()):
            raise DivergedError(_why_diverged(trainer, check))


def _why_diverged(trainer: Trainer, check: FinitenessCheck) -> str:
    mine = [
        (trainer.processes.rank, batch.indices[~torch.isfinite(loss).cpu()].tolist()) for batch, loss in check.losses
    ]
    found = [(rank, images) for part in trainer.processes.gather(mine) for rank, images in part if images]
    where = "; ".join(f"rank {rank}: the loss of image {', '.join(map(str, images[:8]))}" for rank, images in found)
    return (
        f"step {check.step + 1}: {where + ' is not finite' if found else 'the gradient is not finite, though every loss is'}"
        f" (gradient norm {check.grad_norm.item()}). Nothing after step {check.step} was saved or logged; "
        f"{last_checkpoint(trainer)}. Try a lower learning rate, warm-up or gradient clipping"
    )


def last_checkpoint(trainer: Trainer) -> str:
    """What a run that ends here goes on from: on rank 0 the newest that was written, on others the newest that was asked for."""
    step = trainer.saved_step
    if trainer.processes.is_main:
        trainer.writer.close()
        step = max((checkpoint.step for checkpoint in trainer.rundir.checkpoints()), default=0)
    return f"last checkpoint: step {step}" if step else "no checkpoint yet"
