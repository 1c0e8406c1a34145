"""Images of one set of weights and their features, batch by batch on disk, so that a scoring that was killed goes on.

A batch is what all processes finished in one round. It says which images it holds, so the next start may use any number of
processes and any batch size.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ddpm_ema.averaging.files import save_tensors
from ddpm_ema.errors import UserError
from ddpm_ema.messages import logger
from ddpm_ema.rundir import as_user_error, read_tensors

KEPT = "What was scored before is whole"
FIRST_IMAGES = 16
"""Images of every set of weights that are always stored, and sampled in batches of their own on rank 0: sampled again under the
same versions they are equal to the byte, whatever the batch size and the number of processes."""
SECONDS = ("seconds", "sampling_seconds")
B = TypeVar("B", bound="Batch")


@dataclass(kw_only=True)
class Batch:
    """What is known of some images of one set of weights: CPU tensors with a row per image."""

    indices: Tensor  # which images, int64 [n]
    seconds: float = 0.0  # that it took to make them, or their features
    sampling_seconds: float = 0.0  # that it took to sample them, where they were sampled for their features

    def __len__(self) -> int:
        return len(self.indices)

    def _per_image(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def select(self: B, kept: Tensor) -> B:
        """Those images for which `kept`, bool `[n]`, holds; seconds are shared out evenly."""
        share = int(kept.sum()) / max(1, len(self))
        parts: dict[str, Any] = {name: value[kept] for name, value in self._per_image().items()}
        return type(self)(**parts, **{name: share * getattr(self, name) for name in SECONDS})

    @classmethod
    def join(cls: type[B], batches: Iterable[B], indices: Tensor) -> B:
        """The images `indices` (int64 `[n]`, ascending) of all batches. Memory: the result and one batch."""
        joined = Joined(cls, indices)
        for batch in batches:
            joined.add(batch)
        return joined.result()

    def to_tensors(self) -> dict[str, Tensor]:
        times = {name: torch.tensor([getattr(self, name)], dtype=torch.float64) for name in SECONDS}
        return {**self._per_image(), **times}

    @classmethod
    def read(cls: type[B], path: Path) -> B:
        """Raises UserError or ValueError for a file that is no such batch."""
        tensors: dict[str, Any] = read_tensors(path)
        try:
            batch = cls(**tensors | {name: float(tensors[name]) for name in SECONDS})
        except (KeyError, TypeError) as error:
            raise ValueError(f"it is no batch of {cls.__name__} ({error})") from None
        if {len(tensor) for tensor in batch._per_image().values()} != {len(batch)}:
            raise ValueError("its parts have different lengths")
        if not all(
            torch.isfinite(t.sum(dtype=torch.float64)) for t in batch._per_image().values() if t.is_floating_point()
        ):
            raise ValueError("its features are not finite")
        return batch


class Joined(Generic[B]):
    """Becomes one batch of the images `indices` (int64 `[n]`, ascending), as the batches come that hold them."""

    def __init__(self, kind: type[B], indices: Tensor) -> None:
        self.kind, self.indices = kind, indices
        self._room: dict[str, Any] = {}
        self._seconds = dict.fromkeys(SECONDS, 0.0)

    def add(self, batch: B) -> None:
        rows = torch.searchsorted(self.indices, batch.indices).clamp(max=len(self.indices) - 1)
        kept = self.indices[rows] == batch.indices
        part, rows = (batch, rows) if kept.all() else (batch.select(kept), rows[kept])
        for name, value in part._per_image().items():
            if name not in self._room:
                self._room[name] = value.new_empty(len(self.indices), *value.shape[1:])
            self._room[name].index_copy_(0, rows, value)
        self._seconds = {name: total + getattr(part, name) for name, total in self._seconds.items()}

    def result(self) -> B:
        return self.kind(**self._room | self._seconds)


@dataclass(kw_only=True)
class ImageBatch(Batch):
    """The images themselves, uint8 `[n, C, H, W]`."""

    images: Tensor


@dataclass(kw_only=True)
class FeatureBatch(Batch):
    """What one extractor makes of images."""

    features: Tensor  # float32 [n, d]
    saturated: Tensor  # share of each image's channel values at 0 or 255, float32 [n]
    contrast: Tensor  # each image's largest channel value less its smallest, uint8 [n]


def pixel_figures(images: Tensor) -> tuple[Tensor, Tensor]:
    """`saturated` and `contrast` of uint8 images `[n, C, H, W]`: see FeatureBatch."""
    values = images.flatten(1)
    saturated = ((values == 0) | (values == 255)).float().mean(dim=1)
    return saturated.cpu(), (values.amax(dim=1) - values.amin(dim=1)).cpu()


class BatchStore(Generic[B]):
    """Batches of one `kind`, kept in `folder` under names that begin with `prefix`, each whole or not at all, read one at a time.

    A damaged file is named and deleted; its images are made again.
    """

    def __init__(self, folder: Path, prefix: str, kind: type[B]) -> None:
        self.folder, self.prefix, self.kind = folder, prefix, kind
        self._indices: dict[Path, Tensor] = {}
        taken: set[int] = set()
        for path in sorted(folder.glob(f"{prefix}-*.safetensors")):
            try:
                indices = kind.read(path).indices.clone()  # a view would hold on to the whole file
                images = set(indices.tolist())
                if images & taken or len(images) != len(indices):
                    raise ValueError("it repeats images of another batch")
            except (UserError, ValueError) as error:
                logger.warning(f"{path}: {error}; its images are made again")
                path.unlink(missing_ok=True)
                continue
            taken |= images
            self._indices[path] = indices

    def add(self, batch: B) -> None:
        """Keeps those of its images that are not there yet."""
        new = ~torch.isin(batch.indices, torch.tensor(sorted(self._all()), dtype=torch.int64))
        if not new.any():
            return
        batch = batch if new.all() else batch.select(new)
        first, last = int(batch.indices[0]), int(batch.indices[-1])
        path = self.folder / f"{self.prefix}-{first:09d}-{last:09d}-{len(batch)}.safetensors"
        tensors = batch.to_tensors()
        with as_user_error(path, sum(tensor.nbytes for tensor in tensors.values()), KEPT):
            save_tensors(path, tensors)
        self._indices[path] = batch.indices

    def _all(self) -> set[int]:
        return {index for indices in self._indices.values() for index in indices.tolist()}

    def missing(self, count: int) -> list[int]:
        """Those of the images 0 ... count − 1 that it lacks."""
        return sorted(set(range(count)) - self._all())

    def join(self, count: int) -> B:
        """Images 0 ... count − 1, of which none may be missing."""
        return self.read(torch.arange(count))

    def read(self, indices: Tensor) -> B:
        """These images, int64 `[n]`, ascending, at least one, of which none may be missing."""
        return self.kind.join(self._holding(indices), indices)

    def first_batches(self) -> list[B]:
        """Those that hold nothing but images below FIRST_IMAGES: each was sampled as one batch."""
        found = self._holding(torch.arange(FIRST_IMAGES))
        return [batch for batch in found if int(batch.indices[-1]) < FIRST_IMAGES]

    def _holding(self, indices: Tensor) -> Iterator[B]:
        return (self.kind.read(path) for path, held in self._indices.items() if torch.isin(held, indices).any())
