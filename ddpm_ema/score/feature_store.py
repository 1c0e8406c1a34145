"""Features of one set of weights, batch by batch on disk, so that a scoring that was killed goes on with what is done.

A batch is what all processes finished in one round. It says which images it holds, so the next start may use any number of
processes and any batch size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_ema.averaging.files import save_tensors
from ddpm_ema.errors import UserError
from ddpm_ema.messages import logger
from ddpm_ema.rundir import as_user_error, read_tensors

KEPT = "What was scored before is whole"
FIRST_IMAGES = 16
"""Images of every set of weights that are stored themselves, and sampled in batches of their own on rank 0: sampled again
under the same versions they are equal to the byte, whatever the batch size and the number of processes."""
PER_IMAGE = ("indices", "features", "logits", "saturated", "contrast")


@dataclass
class FeatureBatch:
    """Features of some images of one set of weights, CPU tensors.

    Attributes:
        indices: which images, int64 `[n]`.
        features: float32 `[n, d]`.
        logits: float32 `[n, k]`, or None.
        saturated: share of each image's channel values at 0 or 255, float32 `[n]`.
        contrast: each image's largest channel value less its smallest, uint8 `[n]`.
        shown: those of the images that are stored themselves, int64 `[m]`.
        images: uint8 `[m, C, H, W]`.
        seconds: that it took to make them.
    """

    indices: Tensor
    features: Tensor
    logits: Tensor | None
    saturated: Tensor
    contrast: Tensor
    shown: Tensor
    images: Tensor
    seconds: float = 0.0

    def __len__(self) -> int:
        return len(self.indices)

    @classmethod
    def join(cls, batches: Iterable[FeatureBatch], indices: Tensor) -> FeatureBatch:
        """The images `indices` (int64 `[n]`, ascending) of all batches. Memory: the result and one batch."""
        room: dict[str, Tensor] = {}
        shown, images, seconds = [], [], 0.0
        for batch in batches:
            kept = torch.isin(batch.indices, indices)
            rows = torch.searchsorted(indices, batch.indices[kept])
            for name in PER_IMAGE:
                value: Tensor | None = getattr(batch, name)
                if value is None:
                    continue
                if name not in room:
                    room[name] = value.new_zeros(len(indices), *value.shape[1:])
                room[name].index_copy_(0, rows, value if kept.all() else value[kept])
            shown.append(batch.shown.clone())  # a view would hold on to the whole file
            images.append(batch.images.clone())
            seconds += batch.seconds * len(rows) / max(1, len(batch))
        order = torch.cat(shown).argsort()
        tensors: dict[str, Any] = {"logits": None, **room}
        return cls(**tensors, shown=torch.cat(shown)[order], images=torch.cat(images)[order], seconds=seconds)

    def to_tensors(self) -> dict[str, Tensor]:
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return {**tensors, "seconds": torch.tensor([self.seconds], dtype=torch.float64)}

    @classmethod
    def read(cls, path: Path) -> FeatureBatch:
        """Raises UserError or ValueError for a file that is no batch of features."""
        tensors = read_tensors(path)
        try:
            seconds, logits = float(tensors.pop("seconds")), tensors.pop("logits", None)
            batch = cls(**tensors, logits=logits, seconds=seconds)
        except (KeyError, TypeError) as error:
            raise ValueError(f"it is no batch of features ({error})") from None
        lengths = {len(tensors[name]) for name in PER_IMAGE if name in tensors}
        if lengths != {len(batch)} or len(batch.shown) != len(batch.images):
            raise ValueError("its parts have different lengths")
        if not torch.isfinite(batch.features.sum(dtype=torch.float64)):
            raise ValueError("its features are not finite")
        return batch


def pixel_figures(images: Tensor) -> tuple[Tensor, Tensor]:
    """`saturated` and `contrast` of uint8 images `[n, C, H, W]`: see FeatureBatch."""
    values = images.flatten(1)
    saturated = ((values == 0) | (values == 255)).float().mean(dim=1)
    return saturated.cpu(), (values.amax(dim=1) - values.amin(dim=1)).cpu()


class FeatureStore:
    """Batches of one set of weights, kept in `folder`, each whole or not at all, and read one at a time.

    A damaged file is named and deleted; its images are made again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._indices: dict[Path, Tensor] = {}
        taken: set[int] = set()
        for path in sorted(folder.glob("features-*.safetensors")):
            try:
                indices = FeatureBatch.read(path).indices.clone()  # a view would hold on to the whole file
                images = set(indices.tolist())
                if images & taken or len(images) != len(indices):
                    raise ValueError("it repeats images of another batch")
            except (UserError, ValueError) as error:
                logger.warning(f"{path}: {error}; its images are made again")
                path.unlink(missing_ok=True)
                continue
            taken |= images
            self._indices[path] = indices

    def add(self, batch: FeatureBatch) -> None:
        first, last = int(batch.indices[0]), int(batch.indices[-1])
        path = self.folder / f"features-{first:09d}-{last:09d}-{len(batch)}.safetensors"
        tensors = batch.to_tensors()
        with as_user_error(path, sum(tensor.nbytes for tensor in tensors.values()), KEPT):
            save_tensors(path, tensors)
        self._indices[path] = batch.indices

    def missing(self, count: int) -> list[int]:
        """Those of the images 0 ... count − 1 that it lacks."""
        done = {index for indices in self._indices.values() for index in indices.tolist()}
        return [index for index in range(count) if index not in done]

    def join(self, count: int) -> FeatureBatch:
        """Images 0 ... count − 1, of which none may be missing."""
        return FeatureBatch.join(self._below(count), torch.arange(count))

    def first_batches(self) -> list[FeatureBatch]:
        """Those that hold nothing but images below FIRST_IMAGES: each was sampled as one batch."""
        return [batch for batch in self._below(FIRST_IMAGES) if int(batch.indices[-1]) < FIRST_IMAGES]

    def _below(self, count: int) -> Iterator[FeatureBatch]:
        """Batches that hold some of the images 0 ... count − 1."""
        return (FeatureBatch.read(path) for path, indices in self._indices.items() if int(indices[0]) < count)


def first_images(folder: Path, count: int) -> Tensor | None:
    """Images that are stored in `folder`, at most the first `count`, uint8 `[m, C, H, W]`; None where they were lost."""
    paths = [path for path in folder.glob("features-*.safetensors") if int(path.name.split("-")[1]) < count]
    try:
        return FeatureBatch.join(map(FeatureBatch.read, paths), torch.arange(count)).images[:count] if paths else None
    except (UserError, ValueError):
        return None
