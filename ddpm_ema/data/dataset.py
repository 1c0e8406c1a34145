"""A set of images by index, whichever way they are kept, and how it is opened."""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ddpm_ema.config import DataSettings
from ddpm_ema.data import workers
from ddpm_ema.data.cache import Cached, Fingerprint, digest_settings, open_cached, readable
from ddpm_ema.data.convert import Conversion
from ddpm_ema.data.decode import Decoding, decode
from ddpm_ema.data.folder_source import open_folder
from ddpm_ema.data.indexed_source import open_digits
from ddpm_ema.data.source import Source
from ddpm_ema.errors import UserError
from ddpm_ema.transfer import to_device

MEMORY_BUDGET = 2**30  # bytes of decoded images that storage "auto" keeps in memory, or on the device

Storage = Literal["device", "memory", "mmap", "stream"]


class ImageDataset:
    """Images by index: uint8 `[n, C, H, W]`, in the order of the source, never flipped.

    `fingerprint` is the sha256 of the decoded pixels, the labels and the conversion, the same for every storage but
    "stream", whose images are never all read: there it covers names and sizes instead of pixels.
    """

    def __init__(self, source: Source, cached: Cached, storage: Storage, movable: bool) -> None:
        self.name = source.name
        self.storage: Storage = storage
        self.fingerprint = cached.fingerprint
        self.num_ignored = source.num_ignored
        self.skipped = [*source.skipped, *(f"{source.where(index)}: {why}" for index, why in cached.bad)]
        """One line, with the reason, per file that was skipped: broken links, loops, unreadable images."""
        self.num_classes = source.num_classes
        self._source, self._images, self._movable = source, cached.images, movable
        self._kept, self.labels = readable(source, cached.bad)
        """int64 `[N]` on the CPU, or None where the images have none."""

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """C, H, W."""
        channels, height, width = self._images.shape[1:]
        return channels, height, width

    def where(self, index: int) -> str:
        """A path, or another name that a person finds image `index` by."""
        return self._source.where(int(self._kept[index]))

    def batch(self, indices: Tensor) -> Tensor:
        """The images at `indices` (int64 `[n]`), uint8 `[n, C, H, W]`, on the device the cache is on."""
        return self._images.index_select(0, to_device(indices, self._images.device))

    def stream(self, index_batches: Iterable[Tensor]) -> Generator[Tensor, None, None]:
        """`batch` of each of `index_batches`, in that order; images that are not cached are decoded ahead of need."""
        for indices in index_batches:
            yield self.batch(indices)

    def to(self, device: torch.device | str) -> ImageDataset:
        """Moves the images to `device` if storage is "device", or "auto" and they fit; others stay. Returns self."""
        if self._movable:
            self._images = self._images.to(device)
            self.storage = "memory" if self._images.device.type == "cpu" else "device"
        return self

    def __str__(self) -> str:
        """One line for a person."""
        channels, height, width = self.image_shape
        classes = f", {self.num_classes} classes" if self.labels is not None else ""
        ignored = f", {self.num_ignored} other files ignored" if self.num_ignored else ""
        skipped = f", {len(self.skipped)} passed over" if self.skipped else ""
        places = {"device": "on the device", "memory": "in memory", "mmap": "memory-mapped", "stream": "streamed"}
        where = places[self.storage]
        return f"{self.name}: {len(self):,} images {channels}×{height}×{width}{classes}, {where}{ignored}{skipped}"


class StreamedDataset(ImageDataset):
    """Images that are decoded each time they are read."""

    def __init__(
        self, source: Source, conversion: Conversion, bad: list[tuple[int, str]], fingerprint: str, num_workers: int
    ) -> None:
        nothing = torch.empty(0, *conversion.shape, dtype=torch.uint8)
        super().__init__(source, Cached(nothing, bad, fingerprint), "stream", movable=False)
        self._conversion, self._num_workers = conversion, num_workers

    def batch(self, indices: Tensor) -> Tensor:
        """As `ImageDataset.batch`, decoded here and now, on the CPU."""
        chosen = self._kept[indices.cpu()].tolist()
        pixels = np.empty((len(chosen), *self._conversion.shape), np.uint8)
        for row, index in enumerate(chosen):
            pixels[row] = decode(self._source, self._conversion, index)
        return torch.from_numpy(pixels)

    def stream(self, index_batches: Iterable[Tensor]) -> Generator[Tensor, None, None]:
        """As `ImageDataset.stream`, decoded by `data.num_workers` processes ahead of need."""
        chosen = (self._kept[indices.cpu()].tolist() for indices in index_batches)
        return workers.stream(self._source, self._conversion, chosen, self._num_workers)


def load(settings: DataSettings, *, split: str | None = None) -> ImageDataset:
    """Opens the images that the settings name.

    With several processes on a machine call it on one of them first: it downloads and decodes what the others then find (for
    storage "mmap" a lock ensures that anyway).

    Args:
        settings: which images, their size, and how they are kept.
        split: in place of `settings.split`.

    Raises:
        UserError: the images are missing, unreadable or too few, or cannot be kept.
    """
    cache_dir = settings.cache_folder
    source = _open(settings, split or settings.split, cache_dir)
    conversion = Conversion(settings.image_size, settings.channels, settings.background)
    storage = _storage(settings, len(source))
    if storage == "stream":
        dataset: ImageDataset = _streamed(source, conversion, settings)
    elif storage == "mmap":
        dataset = ImageDataset(
            source, open_cached(source, conversion, settings.max_bad_images, cache_dir), "mmap", False
        )
    else:
        cached = _in_memory(source, conversion, settings.max_bad_images)
        dataset = ImageDataset(source, cached, "memory", movable=settings.storage in ("auto", "device"))
    if len(dataset) == 0:
        raise UserError(f"none of the {len(source)} images of {source.name} can be read: {dataset.skipped[0]}")
    return dataset


def _open(settings: DataSettings, split: str, cache_dir: Path) -> Source:
    if settings.source == "digits":
        return open_digits(split)
    if settings.source == "folder":
        if settings.path is None:
            raise UserError("data.path: a folder source needs the folder that holds the images")
        return open_folder(settings.path, split)
    if settings.name is None:
        raise UserError(f"data.name: a {settings.source} source needs the name of a data set")
    # Imported where they are needed: either library takes seconds to import.
    if settings.source == "torchvision":
        from ddpm_ema.data.torchvision_source import open_torchvision

        return open_torchvision(settings.name, split, settings.path or cache_dir / "torchvision")
    from ddpm_ema.data.hub_source import open_hub

    return open_hub(settings.name, split)


def _storage(settings: DataSettings, num_images: int) -> Storage:
    if settings.storage == "auto":
        fits = num_images * settings.channels * settings.image_size**2 <= MEMORY_BUDGET
        return "memory" if fits else "mmap"
    return settings.storage


def _in_memory(source: Source, conversion: Conversion, max_bad: int) -> Cached:
    images = torch.empty(len(source), *conversion.shape, dtype=torch.uint8)
    decoding, fingerprint, count = Decoding(source, conversion, max_bad), Fingerprint(conversion), 0
    for pixels in decoding:
        images[count : count + len(pixels)] = torch.from_numpy(pixels)
        fingerprint.update(pixels)
        count += len(pixels)
    return Cached(images[:count], decoding.bad, fingerprint.hexdigest(readable(source, decoding.bad)[1]))


def _streamed(source: Source, conversion: Conversion, settings: DataSettings) -> StreamedDataset:
    """Reads all images once if some may be skipped, to know which; otherwise none before it is needed."""
    decoding = Decoding(source, conversion, settings.max_bad_images)
    if settings.max_bad_images:
        deque(decoding, maxlen=0)
    lines = [json.dumps(digest_settings(conversion), sort_keys=True), "names and sizes", *source.listing()]
    fingerprint = hashlib.sha256(b"\n".join(os.fsencode(line) for line in lines)).hexdigest()
    return StreamedDataset(source, conversion, decoding.bad, fingerprint, settings.num_workers)
