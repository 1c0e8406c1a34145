"""What samples are compared with: every image of a split, once, unflipped; or a file of statistics."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_ema import keyed_random, metrics
from ddpm_ema.config import Config
from ddpm_ema.data import HELD_OUT
from ddpm_ema.keyed_random import Purpose
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


def floor_split(config: Config) -> str:
    """The real images that are compared with the reference: those held out, of a test split, which may not exist, or trained on.

    Empty where these may be among the reference's.
    """
    split = reference_split(config)
    if config.data.held_out and split != HELD_OUT:
        return HELD_OUT
    floor = "test" if split in (None, config.data.split) else config.data.split
    return "" if split is not None and _share_images(split, floor) else floor


def trained_on(config: Config) -> str | None:
    """Which of `reference` and `floor` are all images that were trained on; None for neither."""
    if reference_split(config) == config.data.split:
        return "reference"
    return "floor" if floor_split(config) == config.data.split else None


def reading_of(config: Config) -> str:
    """What the distances are from: `training images`, `images` of whatever else, or the `population` that they are a sample of.

    The last only where the model was trained on none of them (samples that copy their reference are not independent of it), and
    not for a file of statistics, whose images are not at hand.
    """
    split, trained = reference_split(config), config.data.split
    if split is None or split == trained:
        return "images" if split is None else "training images"
    return "images" if _share_images(split, trained) else "population"


def _share_images(one: str, other: str) -> bool:
    """Whether two splits may: `train[:50%]+test` takes images from train and test, `all` from any; what is held out is apart."""
    ours, theirs = ({part.partition("[")[0].strip() for part in text.split("+")} for text in (one, other))
    return HELD_OUT not in (one, other) and (bool(ours & theirs) or "all" in ours | theirs)


def open_references(generator: Generator, of: str = "reference") -> Jobs[dict[str, Reference]]:
    """The images that samples are compared with, by extractor: from their file, from the cache, or read once for all extractors.

    `of`: `reference`, or `floor` for the real images that are compared with it.
    """
    config = generator.config
    split = reference_split(config) if of == "reference" else floor_split(config)
    if split is None:
        path = Path(config.evaluation.reference)
        return {key: metrics.read_published(path, one.dim) for key, one in generator.extractors.items()}
    cache, fingerprint = config.data.cache_folder, generator.datasets[split].fingerprint
    resize = f"centre-crop, antialiased, {config.data.image_size} px, {config.data.channels} channels"
    found: dict[str, Reference] = {}
    lacking: dict[str, dict[str, Any]] = {}
    kept = dict.fromkeys(generator.extractors, True)
    for name, extractor in generator.extractors.items():
        key = metrics.content_key(fingerprint=fingerprint, split=split, resize=resize, extractor=extractor.identity)
        reference = metrics.load_cached(cache, key)
        if reference is None:
            lacking[name] = key
        else:
            found[name] = reference
    if lacking:
        features = yield from _features(generator, of, split, tuple(lacking))
        for name, key in lacking.items():
            saturated = float(features[name].saturated.double().mean())
            found[name] = metrics.reference_of(features[name].features, key, saturated)
            kept[name] = metrics.keep(found[name], cache)
    for name, reference in found.items():
        if of == "floor" or not config.evaluation.precision_recall:
            found[name] = replace(reference, radii=None, precision_of_noise=None)
        elif reference.radii is None:  # after its features were kept: this may take hours
            found[name] = metrics.with_radii(reference, generator.extractors[name](noise_images(generator.image_shape)))
            if kept[name]:  # else that it cannot be was said
                metrics.keep(found[name], cache)
    return found


def _features(
    generator: Generator, title: str, split: str, extractors: tuple[str, ...]
) -> Jobs[dict[str, FeatureBatch]]:
    """Of all images of a split, by extractor. Memory: the features, and one batch."""
    images = torch.arange(len(generator.datasets[split]))
    joined = {key: Joined(FeatureBatch, images) for key in extractors}

    def take(made: Made) -> None:
        for key, batch in made.items():
            joined[key].add(batch)

    yield Job(title, images.tolist(), extractors, take, split=split)
    return {key: one.result() for key, one in joined.items()}


def noise_images(image_shape: Sequence[int], count: int = 256) -> Tensor:
    """uint8 `[count, C, H, W]`: every channel value uniform in 0 ... 255, the same images at every call."""
    size, made = math.prod(image_shape), []
    for positions in torch.arange(count).split(16):
        words = keyed_random.words(0, Purpose.NOISE_IMAGES, 0, positions, -(-size // 4))  # [n, words]
        values = words[:, :, None] >> torch.tensor([0, 8, 16, 24])  # [n, words, 4]
        made.append((values & 255).to(torch.uint8).flatten(1)[:, :size])
    return torch.cat(made).reshape(count, *image_shape)
