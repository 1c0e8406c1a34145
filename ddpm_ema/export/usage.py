"""What is exported, and the Python code that samples with it as the scoring did, without this package."""

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

    `beyond` lists why the pipeline's own call cannot; the code is a loop over the scheduler's steps then.
    """

    def __init__(self, config: Config, settings: EvaluationSettings, network: Any) -> None:
        trained, self.data, self.factory = config.diffusion, config.data, config.model.factory
        noise_scheduler: Any = diffusion.noise_scheduler(trained)
        self.settings, self.network, self.steps = settings, network, settings.num_inference_steps
        self.scheduler = sampling.scheduler_for(noise_scheduler.config, settings)
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

    def code(self, variant: str | None) -> str:
        """Python that loads the folder and saves a sample."""
        name = f", variant={variant!r}" if variant else ""
        load = ["", f'pipeline = DiffusionPipeline.from_pretrained("path/to/this/folder"{name})']
        imports = ["import torch"] * bool(self.beyond) + ["from diffusers import DiffusionPipeline"]
        if self.factory is not None:
            load = list(self._load())
        elif self.beyond:
            load.append("unet, scheduler = pipeline.unet, pipeline.scheduler")
        sample = list(self._loop()) if self.beyond else [self._call()]
        return "\n".join([*imports, *load, *sample, 'images[0].save("sample.png")'])

    def _load(self) -> Iterator[str]:
        """Lines that make the factory's network and its scheduler."""
        module, _, function = str(self.factory).partition(":")
        kind, channels, size = type(self.scheduler).__name__, self.data.channels, self.data.image_size
        yield f"from diffusers import {kind}"
        yield "from safetensors.torch import load_file"
        yield f"from {module} import {function}  # the code of this network"
        yield ""
        shape = f"image_size={size}, channels={channels}, out_channels={self.outputs}, num_classes={self.no_label}"
        yield f"network = {function}({shape}).eval()"
        yield 'network.load_state_dict(load_file("path/to/this/folder/model.safetensors"))'
        yield f'scheduler = {kind}.from_pretrained("path/to/this/folder", subfolder="scheduler")'

    def _options(self) -> str:
        """Arguments that DDIM takes: its noise, and noise derived anew from the clipped x_0."""
        if self.settings.sampler != "ddim":
            return ""
        eta = f", eta={self.settings.eta:g}" if self.settings.eta else ""
        return eta + (", use_clipped_model_output=True" if self.settings.clip_sample else "")

    def _call(self) -> str:
        return f"images = pipeline(batch_size=16, num_inference_steps={self.steps}{self._options()}).images"

    def _loop(self) -> Iterator[str]:
        if self.no_label is not None:
            yield f"labels = torch.arange(16) % {self.no_label}  # {self.no_label} itself means: no label"
        yield f"x_t = torch.randn(16, {self.data.channels}, {self.data.image_size}, {self.data.image_size})"
        yield from self._schedule()
        yield "with torch.inference_mode():"
        yield f"    for {'t, level in zip(timesteps, scheduler.timesteps)' if self.respaced else 't in scheduler.timesteps'}:"
        yield from (f"        {line}" for line in self._predict())
        yield f"        step = scheduler.step(prediction, {'level' if self.respaced else 't'}, x_t{self._options()})"
        yield "        x_t = step.prev_sample"
        if self.noisy_end:
            yield "x_t = step.pred_original_sample  # to which the last step added noise"
        yield "images = DiffusionPipeline.numpy_to_pil((x_t / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy())"

    def _schedule(self) -> Iterator[str]:
        if self.own_timesteps and not self.respaced:
            yield f"scheduler.set_timesteps({self.steps})"
            return
        # As sampling.trailing has it.
        spaced = f"[round({self.timesteps[0] + 1} * left / {self.steps}) - 1 for left in range({self.steps}, 0, -1)]"
        if not self.respaced:
            yield f"scheduler.set_timesteps(timesteps={spaced})"
            return
        chain = f'num_train_timesteps={self.steps}, timestep_spacing="leading"'
        yield f"timesteps = {spaced}"
        yield "alphas_cumprod = scheduler.alphas_cumprod[timesteps[::-1]]  # the chain of these noise levels alone"
        yield f"scheduler = type(scheduler).from_config(scheduler.config, {chain})"
        yield f"scheduler.set_timesteps({self.steps})"
        yield "scheduler.alphas_cumprod = alphas_cumprod"

    def _predict(self) -> Iterator[str]:
        """Guidance is without + scale (with - without), in one pass (Ho & Salimans 2022)."""
        if self.no_label is None or self.settings.guidance_scale == 1:
            yield f"prediction = {self._evaluation('x_t', 16, None if self.no_label is None else 'labels')}"
        else:
            yield f"both = torch.cat([labels, torch.full_like(labels, {self.no_label})])"
            yield f"prediction, without = {self._evaluation('torch.cat([x_t, x_t])', 32, 'both')}.chunk(2)"
            yield f"prediction = without.lerp(prediction, {self.settings.guidance_scale:g})"
        if self.learned:
            yield f"prediction = prediction[:, :{self.data.channels}]  # beside it: the learned variance"

    def _evaluation(self, x_t: str, count: int, labels: str | None) -> str:
        if self.factory is not None:
            return f"network({x_t}, torch.full(({count},), int(t)), {labels})"
        return f"unet({x_t}, t{'' if labels is None else f', class_labels={labels}'}).sample"
