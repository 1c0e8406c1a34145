"""Sampling over all processes: what one process needs for it, built once, and the rounds in which all of them work."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ddpm_ema import batch_order, diffusion, model, sampling
from ddpm_ema.config import Config
from ddpm_ema.distributed import Processes, StopFlag
from ddpm_ema.errors import StoppedError, UserError
from ddpm_ema.features import Extractor
from ddpm_ema.messages import logger
from ddpm_ema.named_weights import (
    NamedWeights,
    PipelineConfig,
    build_scheduler,
    build_unet,
    schedule_of,
    unet_config_of,
)
from ddpm_ema.score.blocks import FIRST_IMAGES, Block, MemoryStore, pixel_figures
from ddpm_ema.score.network import Network
from ddpm_ema.score.together import on_main, only_on_main


@dataclass
class Studio:
    """Network, sampler and extractor of this process. `known_labels` are the data set's, for class-conditional models.

    `network` and `sampler` are there once `prepare` or `load` was called: one network at a time, of the kind that the
    weights need.
    """

    config: Config
    processes: Processes
    extractor: Extractor
    batch_size: int
    num_classes: int | None
    known_labels: Tensor | None
    stop: StopFlag | None = None
    network: Network = field(init=False)
    sampler: sampling.Sampler = field(init=False)
    _built: tuple[Any, Any] | None = field(init=False, default=None)  # configs of the U-Net and the noise schedule
    _own_unet: Any = field(init=False, default=None)

    @classmethod
    def build(
        cls,
        config: Config,
        processes: Processes,
        extractor: Extractor,
        *,
        num_images: int,
        num_classes: int | None,
        known_labels: Tensor | None,
        stop: StopFlag | None = None,
    ) -> Studio:
        """For scorings of about `num_images` images."""
        most = config.evaluation.batch_size
        batch = even_batch(max(1, num_images - FIRST_IMAGES), processes.world_size, most)
        batch = max(batch, min(FIRST_IMAGES, num_images, most))
        return cls(config, processes, extractor, batch, num_classes, known_labels, stop)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        data = self.config.data
        return data.channels, data.image_size, data.image_size

    def own_pipeline(self) -> PipelineConfig:
        """Network and noise schedule of the settings."""
        scheduler = diffusion.noise_scheduler(self.config.diffusion)
        return PipelineConfig(unet_config_of(model.build(self.config, self.num_classes)), schedule_of(scheduler))

    def make_sampler(self, pipeline: PipelineConfig | None) -> sampling.Sampler:
        """Raises UserError where the noise schedule does not allow what `evaluation` asks for."""
        schedule = pipeline.schedule if pipeline is not None else None
        own: Any = diffusion.noise_scheduler(self.config.diffusion)
        scheduler = build_scheduler(schedule) if schedule is not None else own
        return sampling.Sampler(scheduler.config, self.config.evaluation)

    def prepare(self, pipeline: PipelineConfig | None = None) -> bool:
        """Builds network and sampler for weights of this pipeline (None: of the settings); False where they are built.

        Raises UserError for settings that do not fit.
        """
        schedule = pipeline.schedule if pipeline is not None else None
        wanted = pipeline.unet if pipeline is not None else self._own_unet
        same_unet = self._built is not None and self._built[0] == wanted
        if same_unet and self._built == (wanted, schedule):
            return False
        self.sampler = self.make_sampler(pipeline)
        if not same_unet:
            if self._built is not None:
                del self.network  # before the next one takes its memory
            own = pipeline is None
            unet: Any = model.build(self.config, self.num_classes) if own else build_unet(wanted)
            self.network = Network(unet, self.config.evaluation, self.processes.device, self.batch_size)
            wanted = unet_config_of(unet)
            self._own_unet = wanted if own else self._own_unet
        self._built = (wanted, schedule)
        return True

    def load(self, weights: NamedWeights | None) -> None:
        """Takes these weights, which rank 0 alone has (None elsewhere), into a network of their kind. A collective."""
        told = (weights.name, weights.pipeline, len(weights.members)) if weights is not None else None
        told = self.processes.broadcast(told)
        assert told is not None
        name, pipeline, num_members = told
        if self.prepare(pipeline) and self.processes.is_main:
            logger.info(self._description())
        members = []
        for place in range(num_members):
            read = only_on_main(self.processes, partial(_read_member, weights, place))
            members.append(self.processes.broadcast_tensors(read))
        self.network.load(members, name)

    def _description(self) -> str:
        count = sum(parameter.numel() for parameter in self.network.unet.parameters())
        sampler = self.sampler
        return (
            f"network      {count:,} parameters, {self.batch_size} images at once per process\n"
            f"sampler      {sampler.kind}, {len(sampler)} steps, timesteps {sampler.timesteps[0]} to {sampler.timesteps[-1]}"
        )

    def extend(self, name: str, store: MemoryStore, num_images: int) -> None:
        """Makes those of the images 0 ... num_images - 1 that rank 0's `store` lacks, with the weights that are loaded.

        A collective. Raises StoppedError where a rank was asked to stop, UserError for images that are not finite: all
        ranks alike. What finished rounds made is in the store then.
        """
        missing = self.processes.broadcast(self._missing(store, num_images) if self.processes.is_main else None)
        assert missing is not None
        first = [index for index in missing if index < FIRST_IMAGES]
        together = self.processes.world_size * self.batch_size
        with self._bar(name, num_images, num_images - len(missing)) as bar:
            for images in (*rounds(first, self.batch_size), *rounds(missing[len(first) :], together)):
                block = self.round(name, images, partial(_advance, bar))
                on_main(self.processes, partial(store.add, block))

    def round(self, name: str, images: list[int], advance: Callable[[float], object] = lambda done: None) -> Block:
        """These images as a block, on every rank; the first ones are made by rank 0 alone, as one batch. A collective."""
        start, world = time.perf_counter(), self.processes.world_size
        mine = images[slice(*_ends(batch_order.partition(len(images), self.processes.rank, world)))]
        if images[-1] < FIRST_IMAGES:
            mine = images if self.processes.is_main else []
        parts = self._gather(self._sample(name, mine, advance, len(images)))
        block = Block.join(parts, torch.tensor(images))
        block.seconds = time.perf_counter() - start
        return block

    def _missing(self, store: MemoryStore, num_images: int) -> list[int]:
        done = store.done()
        return [index for index in range(num_images) if index not in done]

    def _sample(
        self, name: str, images: list[int], advance: Callable[[float], object], together: int
    ) -> Block | UserError:
        """This rank's images of a round. An error is returned: the other ranks are waiting to hear of it."""
        steps, checks = len(self.sampler), 0

        def after_step() -> None:
            nonlocal checks
            checks += 1
            self._check_stop(name)
            advance(together / steps)

        try:
            return self._make(name, images, after_step) if images else self._empty()
        except torch.OutOfMemoryError:
            return UserError(f"out of memory with {len(images)} images at once: lower --evaluation.batch-size")
        finally:
            for _ in range(steps - checks):
                self._check_stop(name)  # a collective: as often on every rank, whatever became of its images

    def _make(self, name: str, images: list[int], after_step: Callable[[], None]) -> Block | UserError:
        indices = torch.tensor(images)
        labels = None
        if self.known_labels is not None:
            labels = sampling.labels_for(self.config.evaluation.seed, indices, self.known_labels)
        try:
            made = sampling.sample(
                self.network.predict,
                self.sampler,
                seed=self.config.evaluation.seed,
                indices=indices,
                image_shape=self.image_shape,
                device=self.processes.device,
                labels=labels,
                after_step=after_step,
            )
        except sampling.NonFiniteImages as error:
            return _not_finite(name, [images[position] for position in error.positions])
        return self._block(name, indices, made)

    def _block(self, name: str, indices: Tensor, images: Tensor) -> Block | UserError:
        result = self.extractor(images)
        features, logits = result["features"], result["logits"]
        assert features is not None
        bad = ~torch.isfinite(features).all(dim=1).cpu()
        if bool(bad.any()):
            return _not_finite(name, indices[bad].tolist(), "features")
        shown = indices < max(FIRST_IMAGES, self.config.evaluation.grid_images)
        saturated, contrast = pixel_figures(images)
        return Block(
            indices=indices,
            features=features.cpu(),
            logits=None if logits is None else logits.cpu(),
            saturated=saturated,
            contrast=contrast,
            shown=indices[shown],
            images=images.cpu()[shown],
        )

    def _empty(self) -> Block:
        none = torch.zeros(0, dtype=torch.int64)
        images = torch.zeros(0, *self.image_shape, dtype=torch.uint8)
        return Block(none, torch.zeros(0, self.extractor.dim), None, *pixel_figures(images), none, images)

    def _gather(self, part: Block | UserError) -> list[Block]:
        """Every rank's block, on every rank; the first error, raised on every rank."""
        parts = self.processes.gather(part)
        blocks = []
        for value in parts:
            if isinstance(value, UserError):
                raise value
            blocks.append(value)
        return blocks

    def _check_stop(self, name: str) -> None:
        if self.stop is None or not self.stop.agreed(self.processes):
            return
        self.stop.drain(self.processes)
        raise StoppedError(
            f"stopped by {self.stop.reason} while sampling {name}; finished blocks are kept: start again to go on"
        )

    def _bar(self, name: str, total: int, done: int) -> Any:
        return tqdm(
            total=total,
            initial=done,
            desc=name,
            disable=not self.processes.is_main,
            leave=False,
            dynamic_ncols=True,
            bar_format="{l_bar}{bar}| {n:.0f}/{total} images [{elapsed}<{remaining}, {rate_fmt}]",
            unit=" images",
        )


def _read_member(weights: NamedWeights | None, place: int) -> dict[str, Tensor]:
    assert weights is not None
    return weights.members[place]()


def _not_finite(name: str, images: Sequence[int], what: str = "pixels") -> UserError:
    return UserError(
        f"{name}: the {what} of image {images[0]} are not finite ({len(images)} images of its batch). These weights are "
        "broken or overflow in this precision: try --evaluation.mixed-precision no, or leave the copy out of "
        "--evaluation.weights"
    )


def _advance(bar: Any, done: float) -> None:
    """Not past the end: shares of a round add up to it but for rounding, which tqdm warns of."""
    bar.update(min(done, bar.total - bar.n))


def _ends(part: range) -> tuple[int, int]:
    return part.start, part.stop


def even_batch(num_images: int, world_size: int, most: int) -> int:
    """The batch size at which every process's batches are as equal as can be, at most `most`."""
    num_rounds = max(1, -(-num_images // (world_size * most)))
    return -(-num_images // (num_rounds * world_size))


def rounds(images: list[int], most: int) -> Iterator[list[int]]:
    """`images` cut into pieces of at most `most`, sizes at most one apart."""
    for part in batch_order.micro_batches(range(len(images)), most) if images else []:
        yield images[part.start : part.stop]
