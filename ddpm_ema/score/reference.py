"""What samples are compared with: every image of a split, once, unflipped, its features made by all processes; or a file."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ddpm_ema import batch_order, data, keyed_random, metrics
from ddpm_ema.config import Config
from ddpm_ema.distributed import Processes, StopFlag
from ddpm_ema.errors import StoppedError
from ddpm_ema.features import Extractor
from ddpm_ema.keyed_random import Purpose
from ddpm_ema.messages import logger
from ddpm_ema.metrics import Reference
from ddpm_ema.score.blocks import pixel_figures
from ddpm_ema.score.studio import rounds
from ddpm_ema.score.together import on_main


def is_file(config: Config) -> bool:
    """Whether `evaluation.reference` is a file of statistics rather than a split."""
    return config.evaluation.reference.endswith(".npz")


def load_split(config: Config, processes: Processes, split: str) -> Any:
    """The data set, on every rank; the others find what rank 0 left in the cache."""
    return processes.main_first(lambda: data.load(config.data, split=split))


def reference_split(config: Config) -> str:
    """`train` is the split that was trained on, whatever its name."""
    reference = config.evaluation.reference
    return config.data.split if reference == "train" else reference


def open_reference(
    config: Config, processes: Processes, extractor: Extractor, dataset: Any, stop: StopFlag | None = None
) -> tuple[Reference | None, dict[str, Any]]:
    """(the reference, on rank 0 alone; what it is, on every rank). `dataset` is the split's (None for a file). A collective."""
    found: list[Reference] = []

    def remember(make: Callable[[], Reference | None]) -> dict[str, Any] | None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            reference = make()
        for warning in caught:
            logger.warning(f"{warning.message}")
        if reference is None:
            return None
        found[:] = [reference]
        return {**reference.origin, "size": reference.statistics.count, "notes": list(reference.warnings)}

    if dataset is None:
        path = Path(config.evaluation.reference)
        origin = on_main(processes, lambda: remember(lambda: metrics.read_published(path, extractor.dim)))
    else:
        cache = config.data.cache_folder
        resize = f"centre-crop, antialiased, {config.data.image_size} px, {config.data.channels} channels"
        split = reference_split(config)
        key = metrics.content_key(fingerprint=dataset.fingerprint, split=split, resize=resize, extractor=extractor)
        origin = on_main(processes, lambda: remember(lambda: metrics.load_cached(cache, key)))
        if origin is None:
            features, saturated = _features(processes, extractor, dataset, config.evaluation.extractor_batch_size, stop)

            def make() -> Reference:
                noise = extractor(noise_images((config.data.channels, config.data.image_size, config.data.image_size)))
                return metrics.keep(metrics.reference_of(features, key, saturated, noise["features"]), cache)

            origin = on_main(processes, lambda: remember(make))
    assert origin is not None
    return (found[0] if found else None), origin


def noise_images(image_shape: tuple[int, int, int], count: int = 256) -> Tensor:
    """uint8 `[count, C, H, W]`: every channel value uniform in 0 ... 255, the same images at every call."""
    size, made = math.prod(image_shape), []
    for positions in torch.arange(count).split(16):
        words = keyed_random.words(0, Purpose.NOISE_IMAGES, 0, positions, -(-size // 4))  # [n, words]
        values = words[:, :, None] >> torch.tensor([0, 8, 16, 24])  # [n, words, 4]
        made.append((values & 255).to(torch.uint8).flatten(1)[:, :size])
    return torch.cat(made).reshape(count, *image_shape)


def _features(
    processes: Processes, extractor: Extractor, dataset: Any, batch_size: int, stop: StopFlag | None
) -> tuple[Tensor, float]:
    """float32 `[size, d]` in the data set's order, on rank 0, and the share of saturated channel values.

    Each process takes a share of every round.
    """
    parts, saturated = [], 0.0
    with tqdm(
        total=len(dataset),
        desc="reference",
        unit=" images",
        disable=not processes.is_main,
        leave=False,
        dynamic_ncols=True,
    ) as bar:
        for images in rounds(list(range(len(dataset))), processes.world_size * batch_size):
            if stop is not None and stop.agreed(processes):
                stop.drain(processes)
                raise StoppedError(f"stopped by {stop.reason} while reading the reference; start again")
            share = batch_order.partition(len(images), processes.rank, processes.world_size)
            mine = torch.tensor(images[share.start : share.stop], dtype=torch.int64)
            features, at_ends = torch.zeros(0, extractor.dim), 0.0
            if len(mine):
                made = dataset.batch(mine)
                extracted = extractor(made)["features"]
                assert extracted is not None
                features, at_ends = extracted.cpu(), float(pixel_figures(made)[0].double().sum())
            gathered = processes.gather((features, at_ends))
            if processes.is_main:
                parts.append(torch.cat([part for part, _ in gathered]))
            saturated += sum(share for _, share in gathered)
            bar.update(len(images))
    whole = torch.cat(parts) if parts else torch.zeros(0, extractor.dim)
    return whole, saturated / max(1, len(dataset))
