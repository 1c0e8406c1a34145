"""Weights → features of the images that they generate, on one process, which knows nothing of the others."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ddpm_ema import diffusion, metrics, model, sampling
from ddpm_ema.config import Config
from ddpm_ema.errors import UserError
from ddpm_ema.features import Extractor
from ddpm_ema.named_weights import PipelineConfig, build_scheduler, build_unet, schedule_of, unet_config_of
from ddpm_ema.sampling_network import SamplingNetwork
from ddpm_ema.score.feature_store import FeatureBatch, ImageBatch, pixel_figures

IMAGES = "images"
Made: TypeAlias = "dict[str, Any]"
"""Of some images: an ImageBatch by the name IMAGES, where they were sampled, and a FeatureBatch by the key of each extractor."""


class Generator:
    """Network, sampler and extractors of one process, on one device. One network is held at a time: of the kind that weights need.

    `datasets`: real images by split. That which was trained on says which classes there are.
    """

    def __init__(
        self,
        config: Config,
        extractors: Sequence[Extractor],
        batch_size: int,
        datasets: Mapping[str, Any] | None = None,
    ) -> None:
        self.config, self.batch_size, self.datasets = config, batch_size, dict(datasets or {})
        trained: Any = self.datasets.get(config.data.split)
        self.extractors = {extractor.key: extractor for extractor in extractors}
        self.device = extractors[0].device
        self.num_classes: int | None = trained.num_classes if trained is not None else None
        self.known_labels: Tensor | None = trained.labels if config.model.class_conditional else None
        self.name = ""
        self.network: SamplingNetwork | None = None  # it and the sampler are those of the weights that were loaded
        self.sampler: sampling.Sampler
        self._unet: Mapping[str, Any] | None = None  # arguments of the network; None: the settings' own

    @property
    def image_shape(self) -> tuple[int, int, int]:
        data = self.config.data
        return data.channels, data.image_size, data.image_size

    @cached_property
    def own_pipeline(self) -> PipelineConfig:
        """Network and noise schedule of the settings."""
        scheduler = diffusion.noise_scheduler(self.config.diffusion)
        return PipelineConfig(unet_config_of(model.build(self.config, self.num_classes)), schedule_of(scheduler))

    def sampler_for(self, pipeline: PipelineConfig | None) -> sampling.Sampler:
        """Raises UserError where the noise schedule does not allow what `evaluation` asks for."""
        schedule = pipeline.schedule if pipeline is not None else None
        own: Any = diffusion.noise_scheduler(self.config.diffusion)
        scheduler = build_scheduler(schedule) if schedule is not None else own
        return sampling.Sampler(scheduler.config, self.config.evaluation)

    def load(self, name: str, pipeline: PipelineConfig | None, members: Sequence[Mapping[str, Tensor]]) -> None:
        """Takes weights into a network of their kind; the arguments are those of `NamedWeights`, with its members read.

        Raises UserError where the weights do not fit the network, or the settings do not fit either.
        """
        unet = pipeline.unet if pipeline is not None else None
        if self.network is None or unet != self._unet:
            self.network = None  # before the next one takes its memory
            built: Any = model.build(self.config, self.num_classes) if unet is None else build_unet(unet)
            evaluation = self.config.evaluation
            self.network = SamplingNetwork(built, evaluation, self.device, self.batch_size, model.no_label(built))
            self._unet = unet
        self.name, self.sampler = name, self.sampler_for(pipeline)
        self.network.load(members, name)

    def describe(self) -> str:
        """Network and sampler, for a person."""
        assert self.network is not None
        count = sum(parameter.numel() for parameter in self.network.unet.parameters())
        timesteps = self.sampler.timesteps
        return (
            f"network      {count:,} parameters, {self.batch_size} images at once per process\n"
            f"sampler      {self.sampler.kind}, {len(timesteps)} steps, timesteps {timesteps[0]} to {timesteps[-1]}"
        )

    def generate(
        self, images: list[int], extractors: Sequence[str], after_step: Callable[[], None] = lambda: None
    ) -> Made:
        """Samples these images with the weights that are loaded, and extracts their features; at least one, ascending.

        `after_step` is called after each network evaluation. Raises UserError where memory does not suffice, or images or
        features are not finite.
        """
        start = time.perf_counter()
        try:
            pixels = self._sample(images, after_step)
            indices, kept = torch.tensor(images), pixels.cpu()
            sampled = ImageBatch(indices=indices, images=kept, seconds=time.perf_counter() - start)
            return {IMAGES: sampled, **self.read(self.name, images, pixels, extractors)}
        except torch.OutOfMemoryError:
            raise UserError(f"out of memory with {len(images)} images at once: lower --evaluation.batch-size") from None

    def read(self, name: str, images: list[int], pixels: Tensor, extractors: Sequence[str]) -> Made:
        """Features of these images, uint8 `[n, C, H, W]`, which are called `name` in messages."""
        indices, made = torch.tensor(images), {}
        saturated, contrast = pixel_figures(pixels)
        for key in extractors:
            start = time.perf_counter()
            features = self.extractors[key](pixels)
            metrics.check_finite(features, indices, name=name)
            made[key] = FeatureBatch(
                indices=indices,
                features=features.cpu(),
                saturated=saturated,
                contrast=contrast,
                seconds=time.perf_counter() - start,
            )
        return made

    def _sample(self, images: list[int], after_step: Callable[[], None]) -> Tensor:
        """uint8 [n, C, H, W], on the device."""
        assert self.network is not None
        seed, indices = self.config.evaluation.seed, torch.tensor(images)
        try:
            return sampling.sample(
                self.network.predict,
                self.sampler,
                seed=seed,
                indices=indices,
                image_shape=self.image_shape,
                device=self.device,
                labels=None if self.known_labels is None else sampling.labels_for(seed, indices, self.known_labels),
                after_step=after_step,
            )
        except sampling.NonFiniteImages as error:
            bad = [images[position] for position in error.positions]
            raise metrics.not_finite(self.name, "pixels", bad, len(images)) from None
