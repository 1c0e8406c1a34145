"""What samples are compared with: every image of a split, once, unflipped; or a file of statistics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ddpm_ema import keyed_random, metrics
from ddpm_ema.config import Config
from ddpm_ema.keyed_random import Purpose
from ddpm_ema.messages import logger
from ddpm_ema.metrics import Reference
from ddpm_ema.score.driver import Job, Jobs
from ddpm_ema.score.feature_store import FeatureBatch
from ddpm_ema.score.generate import Generator


def reference_split(config: Config) -> str | None:
    """The split that samples are compared with; None for a file. `train` is the split that was trained on, whatever its name."""
    reference = config.evaluation.reference
    if reference.endswith(".npz"):
        return None
    return config.data.split if reference == "train" else reference


def reading_of(config: Config) -> str:
    """What the distances are from: `training images`, `images` of whatever else, or the `population` that they are a sample of.

    The last only where the model was trained on none of them (samples that copy their reference are not independent of it), and
    not for a file of statistics, whose images are not at hand.
    """
    split, trained = reference_split(config), config.data.split
    if split is None or split == trained:
        return "images" if split is None else "training images"
    # `train[:50%]+test` takes images from train and test.
    ours, theirs = ({part.partition("[")[0].strip() for part in text.split("+")} for text in (split, trained))
    return "images" if ours & theirs else "population"


def compares_with_population(config: Config) -> bool:
    """Whether the reference's own sampling error counts, too."""
    return reading_of(config) == "population"


def open_reference(config: Config, generator: Generator) -> Jobs[Reference]:
    """The reference that `evaluation.reference` names: from its file, from the cache, or from its images."""
    extractor, dataset, split = generator.extractor, generator.compared, reference_split(config)
    if split is None:
        return metrics.read_published(Path(config.evaluation.reference), extractor.dim)
    cache = config.data.cache_folder
    resize = f"centre-crop, antialiased, {config.data.image_size} px, {config.data.channels} channels"
    key = metrics.content_key(fingerprint=dataset.fingerprint, split=split, resize=resize, extractor=extractor)
    reference, notes = metrics.load_cached(cache, key)
    if reference is None:
        batches: list[FeatureBatch] = []
        yield Job("reference", list(range(len(dataset))), batches.append)
        saturated = sum(float(batch.saturated.double().sum()) for batch in batches) / max(1, len(dataset))
        features = torch.cat([batch.features for batch in batches])
        noise = extractor(noise_images(generator.image_shape))["features"]
        reference = metrics.reference_of(features, key, saturated, noise)
        notes += metrics.keep(reference, cache)
    for note in notes:
        logger.warning(note)
    return reference


def noise_images(image_shape: Sequence[int], count: int = 256) -> Tensor:
    """uint8 `[count, C, H, W]`: every channel value uniform in 0 ... 255, the same images at every call."""
    size, made = math.prod(image_shape), []
    for positions in torch.arange(count).split(16):
        words = keyed_random.words(0, Purpose.NOISE_IMAGES, 0, positions, -(-size // 4))  # [n, words]
        values = words[:, :, None] >> torch.tensor([0, 8, 16, 24])  # [n, words, 4]
        made.append((values & 255).to(torch.uint8).flatten(1)[:, :size])
    return torch.cat(made).reshape(count, *image_shape)
