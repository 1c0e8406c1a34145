"""A data source: images by index, labels, and what identifies them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class Source:
    """Images by index, in their original sizes and modes."""

    name: str  # of the set, for people
    size: int
    read: Callable[[int], Any]  # index -> a Pillow image or a uint8 array; raises what the reading library raises
    where: Callable[[int], str]  # index -> a path, or another name by which a person finds the image
    stamp: list[str]  # lines that change when the images on this machine may have changed: the key of a cache file
    labels: Tensor | None = None  # int64 [size]
    num_classes: int | None = None
    classes: str = ""  # how many and which, or why there are none, in words
    skipped: list[str] = field(default_factory=list)  # one line, with the reason, per file
    num_ignored: int = 0  # hidden files, and files whose names are not those of images

    def __len__(self) -> int:
        return self.size
