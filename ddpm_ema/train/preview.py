"""Sample grids while training, from a sampling model of its own: the training model's weights are never swapped."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_ema import diffusion, model, sampling, streams
from ddpm_ema.grids import save_grid
from ddpm_ema.train.state import full_weights
from ddpm_ema.train.step import read_checks
from ddpm_ema.train.trainer import Trainer

PREVIEW_STEPS = 50  # DDIM steps: enough to see what the copies are like, whatever sampler the scoring uses


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
        classes = model.no_label(self.network)
        labels = None if classes is None else indices % classes
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

    def save(self, trainer: Trainer) -> None:
        """Writes the grid: raw and every copy, the same noise, one labelled row each. A collective."""
        read_checks(trainer, lag=0)
        names = ["raw", *trainer.bank.profiles]
        rows = {name: self.images(trainer, full_weights(trainer, name)) for name in names}
        if trainer.processes.is_main:
            title = f"step {trainer.step}, the same noise in every row"
            save_grid(trainer.rundir.sample_grid(trainer.step), rows, title)
