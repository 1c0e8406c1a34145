"""A data source: images by index, labels, and what identifies them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class Source:
    """Images by index, in their original sizes and modes.

    Attributes:
        name: of the set, for people.
        size: number of images.
        read: index -> a Pillow image or a uint8 array; raises what the reading library raises.
        where: index -> a path, or another name by which a person finds the image.
        stamp: lines that change when the images on this machine may have changed: the key of a cache file.
        labels: int64 `[size]`, or None where the images have none.
        num_classes: None without labels.
        classes: how many classes and which, or why there are none, in words; empty where the source does not say.
        skipped: one line, with the reason, per file that was skipped when the source was opened.
        num_ignored: number of hidden files and of files whose names are not those of images.
    """

    name: str
    size: int
    read: Callable[[int], Any]
    where: Callable[[int], str]
    stamp: list[str]
    labels: Tensor | None = None
    num_classes: int | None = None
    classes: str = ""
    skipped: list[str] = field(default_factory=list)
    num_ignored: int = 0

    def __len__(self) -> int:
        return self.size
