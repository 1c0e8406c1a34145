"""A source over an object of a library that gives images by index, and scikit-learn's digits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ddpm_ema.errors import UserError


@dataclass
class IndexedSource:
    """Images that `get(index)` gives. `identity` and `place` are the lines that name them, anywhere and on this machine."""

    name: str
    size: int
    get: Callable[[int], Any]
    labels: Tensor | None
    num_classes: int | None
    identity: list[str]
    place: str = ""
    skipped: list[str] = field(default_factory=list)
    num_ignored: int = 0

    def __len__(self) -> int:
        return self.size

    def read(self, index: int) -> Any:
        return self.get(index)

    def where(self, index: int) -> str:
        return f"{self.name}[{index}]"

    def listing(self) -> list[str]:
        return [self.name, str(self.size), *self.identity]

    def stamp(self) -> list[str]:
        return [*self.listing(), self.place]


def open_digits(split: str) -> IndexedSource:
    """The 1,797 handwritten digits inside scikit-learn: 8×8, 17 grey levels scaled to 0..255, ten classes, one split."""
    if split != "train":
        raise UserError(f"data.split: the digits have one split, train, and no {split!r}")
    from sklearn.datasets import load_digits  # slow to import, and needed for nothing else

    digits = load_digits()
    images: npt.NDArray[np.uint8] = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    labels = torch.from_numpy(digits.target.astype(np.int64))
    return IndexedSource("digits", len(images), images.__getitem__, labels, 10, ["scikit-learn"])
