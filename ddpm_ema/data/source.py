"""The protocol of a data source: images by index, labels, and what identifies them."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class Source(Protocol):
    """Images by index, in their original sizes and modes."""

    name: str
    labels: Tensor | None
    """int64 `[N]`, or None where the images have none."""
    num_classes: int | None
    skipped: list[str]
    """One line, with the reason, per file that was skipped when the source was opened."""
    num_ignored: int
    """Number of hidden files and of files whose names are not those of images."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Any:
        """A Pillow image or a uint8 array; raises what the reading library raises."""
        ...

    def where(self, index: int) -> str:
        """A path, or another name by which a person finds the image."""
        ...

    def listing(self) -> list[str]:
        """Lines that are equal for equal images in any place: the fingerprint of images that are never all read."""
        ...

    def stamp(self) -> list[str]:
        """Lines that change when the images on this machine may have changed: the key of a cache file."""
        ...
