"""What every place that images come from offers to the rest of the package."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class Source(Protocol):
    """Images by index, still in their own sizes and modes."""

    name: str
    labels: Tensor | None
    """int64 `[N]`, or None where the images have none."""
    num_classes: int | None
    skipped: list[str]
    """What was passed over when looking for images, one line each with the reason."""
    num_ignored: int
    """Files that are not images by their names, and hidden files."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Any:
        """A Pillow image or a uint8 array; raises what the reading library raises."""
        ...

    def where(self, index: int) -> str:
        """A path, or another name a person finds the image by."""
        ...

    def listing(self) -> list[str]:
        """Lines that are the same wherever the same images lie: the fingerprint of images that are never all read."""
        ...

    def stamp(self) -> list[str]:
        """Lines that change when the images on this machine may have: names a cache file."""
        ...
