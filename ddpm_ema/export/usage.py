"""What is exported, and how one samples with it as the scoring did, without this package."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers

from ddpm_ema import diffusion, model, sampling
from ddpm_ema.averaging.files import save_tensors
from ddpm_ema.config import Config, EvaluationSettings

# diffusers is not typed. DDPMPipeline calls any scheduler; DDIMPipeline passes on eta and use_clipped_model_output as well.
PIPELINES: dict[str, Any] = {
    "ddpm": diffusers.DDPMPipeline,
    "ddim": diffusers.DDIMPipeline,
    "dpm_solver++": diffusers.DDPMPipeline,
}


class Usage:
    """How to sample from a network that was trained by `config`, as the evaluation settings say.

    `beyond` lists why the pipeline's own call cannot; the code (`templates/sampling.py.txt`) loops over the scheduler's steps then.
    """

    def __init__(self, config: Config, settings: EvaluationSettings, network: Any) -> None:
        trained, self.data, self.factory = config.diffusion, config.data, config.model.factory
        noise_scheduler: Any = diffusion.noise_scheduler(trained)
        self.settings, self.network, self.steps = settings, network, settings.num_inference_steps
        self.scheduler = sampling.scheduler_for(noise_scheduler.config, settings)
        self.kind = type(self.scheduler).__name__
        self.timesteps = sampling.Sampler(noise_scheduler.config, settings).timesteps
        self.scheduler.set_timesteps(self.steps)
        self.own_timesteps = self.scheduler.timesteps.tolist() == self.timesteps
        # DDIMScheduler steps from t to t - T // n.
        self.respaced = settings.sampler == "ddim" and trained.num_train_timesteps % self.steps > 0
        # Of the schedulers, only DDPMScheduler takes a learned variance apart whatever the number of channels.
        self.learned = trained.variance == "learned" and settings.sampler != "ddpm"
        self.noisy_end = settings.sampler == "ddpm" and self.timesteps[-1] > 0
        self.no_label = model.no_label(network)
        self.outputs = config.data.channels * (2 if trained.variance == "learned" else 1)
        self.beyond = list(self._beyond())

    def _beyond(self) -> Iterator[str]:
        if self.factory is not None:
            yield "fits no network but diffusers' own"
            return
        if self.no_label is not None:
            yield "passes no labels"
        if self.learned:
            yield "does not split off the learned variance"
        if self.noisy_end:
            yield "adds noise to the finished image"
        if self.respaced or not self.own_timesteps:
            yield f"visits other noise levels in {self.steps} steps"

    def save(self, folder: Path, variant: str | None) -> None:
        """Writes a pipeline whose scheduler clips and steps as the settings say; of another network its tensors and scheduler."""
        if self.factory is None:
            pipeline = PIPELINES[self.settings.sampler](unet=self.network, scheduler=self.scheduler)
            pipeline.save_pretrained(folder, variant=variant)
            return
        save_tensors(folder / "model.safetensors", self.network.state_dict())
        self.scheduler.save_pretrained(folder / "scheduler")
