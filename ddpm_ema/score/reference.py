"""What samples are compared with: every image of a split, once, unflipped; or a file of statistics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_ema import keyed_random, metrics
from ddpm_ema.config import Config
from ddpm_ema.features import Extractor
from ddpm_ema.keyed_random import Purpose
from ddpm_ema.messages import logger
from ddpm_ema.metrics import Reference
from ddpm_ema.score.driver import Job, Jobs
from ddpm_ema.score.feature_store import FeatureBatch, Joined
from ddpm_ema.score.generate import Generator, Made


def reference_split(config: Config) -> str | None:
    """The split that samples are compared with; None for a file. `train` is the split that was trained on, whatever its name."""
    reference = config.evaluation.reference
    if reference.endswith(".npz"):
        return None
    return config.data.split if reference == "train" else reference


def open_references(config: Config, generator: Generator) -> Jobs[dict[str, Reference]]:
    """What `evaluation.reference` names, by extractor: from its file, from the cache, or from its images, read once for all."""
    if reference_split(config) is None:
        path = Path(config.evaluation.reference)
        return {key: metrics.read_published(path, one.dim) for key, one in generator.extractors.items()}
    cache, found, lacking = config.data.cache_folder, {}, {}
    for extractor in generator.extractors.values():
        key = _content_key(config, generator, extractor)
        reference, notes = metrics.load_cached(cache, key)
        for note in notes:
            logger.warning(note)
        if reference is None:
            lacking[extractor.key] = key
        else:
            found[extractor.key] = reference
    if lacking:
        features = yield from features_of(generator, "reference", tuple(lacking))
        noise = noise_images(generator.image_shape)
        for name, key in lacking.items():
            batch, of_noise = features[name], generator.extractors[name](noise)["features"]
            saturated = float(batch.saturated.double().mean())
            found[name] = metrics.reference_of(batch.features, key, saturated, of_noise)
            for note in metrics.keep(found[name], cache):
                logger.warning(note)
    return found


def _content_key(config: Config, generator: Generator, extractor: Extractor) -> dict[str, Any]:
    resize = f"centre-crop, antialiased, {config.data.image_size} px, {config.data.channels} channels"
    fingerprint, split = generator.datasets["reference"].fingerprint, str(reference_split(config))
    return metrics.content_key(fingerprint=fingerprint, split=split, resize=resize, extractor=extractor)


def features_of(generator: Generator, dataset: str, extractors: tuple[str, ...]) -> Jobs[dict[str, FeatureBatch]]:
    """Of all images of a data set, by extractor. Memory: the features, and one batch."""
    images = torch.arange(len(generator.datasets[dataset]))
    joined = {key: Joined(FeatureBatch, images) for key in extractors}

    def take(made: Made) -> None:
        for key, batch in made.items():
            joined[key].add(batch)

    yield Job(dataset, images.tolist(), extractors, take, dataset=dataset)
    return {key: one.result() for key, one in joined.items()}


def noise_images(image_shape: Sequence[int], count: int = 256) -> Tensor:
    """uint8 `[count, C, H, W]`: every channel value uniform in 0 ... 255, the same images at every call."""
    size, made = math.prod(image_shape), []
    for positions in torch.arange(count).split(16):
        words = keyed_random.words(0, Purpose.NOISE_IMAGES, 0, positions, -(-size // 4))  # [n, words]
        values = words[:, :, None] >> torch.tensor([0, 8, 16, 24])  # [n, words, 4]
        made.append((values & 255).to(torch.uint8).flatten(1)[:, :size])
    return torch.cat(made).reshape(count, *image_shape)
