"""Sample grids while training, from a sampling model of its own: the training model's weights are never swapped."""

import contextlib
from typing import Any

import torch
from torch import Tensor

from ddpm_ema import batch_order, diffusion, model, sampling
from ddpm_ema.config import Config, EvaluationSettings
from ddpm_ema.image_grid import REAL, save_grid
from ddpm_ema.messages import logger
from ddpm_ema.numbers import sampler_label
from ddpm_ema.sampling_network import SamplingNetwork
from ddpm_ema.train.checkpointing import full_weights
from ddpm_ema.train.step import read_checks
from ddpm_ema.train.trainer import Trainer

PREVIEW_STEPS = 50  # at most, whatever the scoring takes: enough to see what the averages are like


def preview_settings(config: Config) -> EvaluationSettings:
    """The evaluation's own sampling where it takes at most PREVIEW_STEPS steps, else that many of them.

    DDIM without noise takes the place of a longer ancestral chain, which degrades in few steps where the variance is
    fixed_large (Song et al. 2021, arXiv 2010.02502, table 1).
    """
    evaluation = config.evaluation
    usable = sampling.usable_levels(diffusion.noise_scheduler(config.diffusion).config, evaluation)
    full = min(evaluation.num_inference_steps, usable)
    update: dict[str, Any] = {"num_inference_steps": min(full, PREVIEW_STEPS)}
    if evaluation.sampler == "ddpm" and full > PREVIEW_STEPS:
        update |= {"sampler": "ddim", "eta": 0.0}
    return evaluation.model_copy(update=update)


def spread(count: int, size: int) -> Tensor:
    """Places of `count` of `size` images, int64 [count]: of all classes, which a folder gives one after another."""
    return torch.arange(count) * size // count


class Preview:
    """A sampling model of its own, for grids while training: the training model's weights are never swapped."""

    def __init__(self, trainer: Trainer) -> None:
        config, processes = trainer.config, trainer.processes
        self.settings = preview_settings(config)
        self.sampler = sampling.Sampler(diffusion.noise_scheduler(config.diffusion).config, self.settings)
        unet, share = model.build(config, trainer.dataset.num_classes), config.training.sample_images
        eager = self.settings.model_copy(update={"compile": False})  # compiling takes longer than a few grids
        self.network = SamplingNetwork(unet, eager, processes.device, share, model.no_label(unet))
        self.note = ""
        if self.settings != config.evaluation:
            self.note = f" (scoring: {sampler_label(config.evaluation.model_dump())})"

    @torch.inference_mode()
    def images(self, trainer: Trainer, weights: dict[str, Tensor]) -> Tensor | None:
        """uint8 [n, C, H, W] on the CPU, of which every process samples its share; None where any are not finite."""
        config, processes = trainer.config, trainer.processes
        self.network.load([weights], "of the preview")
        mine = batch_order.partition(config.training.sample_images, processes.rank, processes.world_size)
        indices = torch.arange(mine.start, mine.stop)
        labels = None if self.network.no_label is None else indices % self.network.no_label
        own = None
        what: dict[str, Any] = {"seed": config.evaluation.seed, "image_shape": trainer.dataset.image_shape}
        what |= {"indices": indices, "labels": labels, "device": processes.device}
        with contextlib.suppress(sampling.NonFiniteImages):
            own = sampling.sample(self.network.predict, self.sampler, **what).cpu()
        shares = [share for share in processes.gather(own) if share is not None]
        return torch.cat(shares) if len(shares) == processes.world_size else None

    def save(self, trainer: Trainer) -> None:
        """Writes the grid: raw and every average, the same noise, one labelled row each. A collective."""
        read_checks(trainer, lag=0)
        names = ["raw", *trainer.bank.profiles]
        sampled = {name: self.images(trainer, full_weights(trainer, name)) for name in names}
        rows = {name: images for name, images in sampled.items() if images is not None}
        if trainer.processes.is_main:
            if missing := ", ".join(name for name in names if name not in rows):
                logger.warning(f"the sample grid of step {trainer.step} lacks {missing}: its images are not finite")
            places = spread(trainer.config.training.sample_images, len(trainer.dataset))
            rows = {REAL: trainer.dataset.batch(places).cpu(), **rows}
            save_grid(trainer.rundir.sample_grid(trainer.step), rows, trainer.step, self.settings, self.note)
