"""A set of images by index, whichever way they are kept, and how it is opened."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ddpm_ema.config import DataSettings
from ddpm_ema.data.cache import Cached, Fingerprint, kept, open_cached
from ddpm_ema.data.convert import Conversion
from ddpm_ema.data.decode import Decoding
from ddpm_ema.data.folder_source import open_folder
from ddpm_ema.data.source import Source
from ddpm_ema.errors import UserError, explained
from ddpm_ema.transfer import to_device

HELD_OUT = "held_out"
"""The split of images that `data.held_out` keeps from training."""
MEMORY_BUDGET = 2**30  # bytes of decoded images that storage "auto" keeps in memory, or on the device

Storage = Literal["device", "memory", "mmap"]


class ImageDataset:
    """Images by index: uint8 `[n, C, H, W]`, in the order of the source, never flipped.

    `fingerprint` is the sha256 of the decoded pixels, the labels and the conversion, the same for every storage; of a part of the
    images also of the share that is held out.
    """

    def __init__(
        self, source: Source, cached: Cached, storage: Storage, movable: bool, share: float = 0, held_out: bool = False
    ) -> None:
        self.name = source.name
        self.storage: Storage = storage
        self.fingerprint = cached.fingerprint
        self.num_ignored = source.num_ignored
        self.skipped = [*source.skipped, *(f"{source.where(index)}: {why}" for index, why in cached.bad)]
        """One line, with the reason, per file that was skipped: broken links, loops, unreadable images."""
        self.num_classes = source.num_classes
        self._source, self._images, self._movable, self._held_out = source, cached.images, movable, held_out
        self._kept, self.labels = kept(source, cached.bad)
        """int64 `[N]` on the CPU, or None where the images have none."""
        self._rows = torch.arange(len(self._images))
        if share:
            self._rows = (is_held_out(self._images, share) == held_out).nonzero()[:, 0]
            self._kept = self._kept[self._rows]
            self.labels = self.labels[self._rows] if self.labels is not None else None
            self.fingerprint = hashlib.sha256(f"{self.fingerprint} {share} {held_out}".encode()).hexdigest()

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
        return self._images.index_select(0, self._rows[to_device(indices, self._rows.device)])

    def to(self, device: torch.device | str) -> ImageDataset:
        """Moves the images to `device` if storage is "device", or "auto" and they fit; others stay. Returns self."""
        if self._movable:
            self._images, self._rows = self._images.to(device), self._rows.to(device)
            self.storage = "memory" if self._images.device.type == "cpu" else "device"
        return self

    def __str__(self) -> str:
        """One line for a person."""
        channels, height, width = self.image_shape
        classes = f", {self.num_classes} classes" if self.labels is not None else ""
        ignored = f", {self.num_ignored} other files ignored" if self.num_ignored else ""
        skipped = f", {len(self.skipped)} passed over" if self.skipped else ""
        others = len(self._images) - len(self)
        apart = f", {others:,} held out" if others and not self._held_out else ""
        where = {"device": "on the device", "memory": "in memory", "mmap": "memory-mapped"}[self.storage]
        return (
            f"{self.name}: {len(self):,} images {channels}×{height}×{width}{classes}, {where}{apart}{ignored}{skipped}"
        )


def is_held_out(images: Tensor, share: float) -> Tensor:
    """Which images are held out: bool `[n]`, of uint8 `[n, C, H, W]` on the CPU.

    It depends on an image's own pixels alone, so another image moves no other, and copies of an image lie on one side, its mirror
    image among them (`data.horizontal_flip` shows that one, too). Near-duplicates may part.
    """

    def position(image: npt.NDArray[np.uint8]) -> float:
        either = min(image.tobytes(), image[..., ::-1].tobytes())
        return int.from_bytes(hashlib.sha256(either).digest()[:8]) / 2**64  # uniform in 0 ... 1

    return torch.tensor([position(image.numpy()) < share for image in images], dtype=torch.bool)


def load(settings: DataSettings, *, split: str | None = None) -> ImageDataset:
    """Opens the images that the settings name: of `settings.split` without those held out.

    With several processes on a machine call it on one of them first: it downloads and decodes what the others then find (for
    storage "mmap" a lock ensures that anyway).

    `split` takes the place of `settings.split`: another split, of which none are held out, or `held_out`, those of
    `settings.split` that are. Raises UserError where the images are missing, unreadable or too few, or cannot be kept.
    """
    cache_dir, held_out = settings.cache_folder, split == HELD_OUT
    share = settings.held_out if split in (None, HELD_OUT, settings.split) else 0.0
    if held_out and not share:
        raise UserError("data.held_out: no image of this run is held out; train with a share such as 0.1")
    source = _open(settings, settings.split if held_out or split is None else split, cache_dir)
    conversion = Conversion(settings.image_size, settings.channels, settings.background)
    fits = len(source) * settings.channels * settings.image_size**2 <= MEMORY_BUDGET
    if settings.storage == "mmap" or (settings.storage == "auto" and not fits):
        cached = open_cached(source, conversion, settings.max_bad_images, cache_dir)
        dataset = ImageDataset(source, cached, "mmap", False, share, held_out)
    else:
        cached = _in_memory(source, conversion, settings.max_bad_images)
        dataset = ImageDataset(source, cached, "memory", settings.storage != "memory", share, held_out)
    if not len(cached.images):
        raise UserError(f"none of the {len(source)} images of {source.name} can be read: {dataset.skipped[0]}")
    if len(dataset) == 0:
        side = "held out" if held_out else "to train on"
        raise UserError(f"data.held_out: {share:g} leaves none of the {len(source)} images of {source.name} {side}")
    return dataset


def _open(settings: DataSettings, split: str, cache_dir: Path) -> Source:
    if settings.source == "digits":
        return _digits(split)
    if settings.source == "folder":
        assert settings.path is not None  # `Config` asks for it, and for the name below
        return open_folder(settings.path, split)
    assert settings.name is not None
    # Imported where they are needed: either library takes seconds to import.
    if settings.source == "torchvision":
        from ddpm_ema.data.torchvision_source import open_torchvision

        return open_torchvision(settings.name, split, settings.path or cache_dir / "torchvision")
    from ddpm_ema.data.hub_source import open_hub

    return open_hub(settings.name, split)


def _digits(split: str) -> Source:
    """Of scikit-learn: 1,797 images of 8×8 pixels, 17 grey levels scaled to 0..255, ten classes."""
    if split != "train":
        raise UserError(f"data.split: the digits have one split, train, and no {split!r}")
    from sklearn.datasets import load_digits  # slow to import, and needed for nothing else

    digits = load_digits()
    images: npt.NDArray[np.uint8] = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    labels = torch.from_numpy(digits.target.astype(np.int64))
    return Source("digits", len(images), images.__getitem__, "digits[{}]".format, ["digits"], labels, 10)


def _in_memory(source: Source, conversion: Conversion, max_bad: int) -> Cached:
    with explained("data.storage: the images do not fit into memory (", RuntimeError, after="); use mmap"):
        images = torch.empty(len(source), *conversion.shape, dtype=torch.uint8)
    decoding, fingerprint, count = Decoding(source, conversion, max_bad), Fingerprint(conversion), 0
    for pixels in decoding:
        images[count : count + len(pixels)] = torch.from_numpy(pixels)
        fingerprint.update(pixels)
        count += len(pixels)
    return Cached(images[:count], decoding.bad, fingerprint.hexdigest(kept(source, decoding.bad)[1]))
