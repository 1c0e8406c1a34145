"""Decodes every image of a source once, in order, with one thread per core."""

import contextlib
import os
import struct
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from ddpm_ema.data.convert import Conversion
from ddpm_ema.data.source import Source
from ddpm_ema.errors import UserError, one_line
from ddpm_ema.messages import bar

Pixels: TypeAlias = npt.NDArray[np.uint8]

UNREADABLE = (
    *(OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError),
    RuntimeError,  # AVIF
)
"""What Pillow and the data-set libraries raise for a file that is damaged or no image at all."""
_AT_ONCE = 64  # images per task of the pool


def num_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def reason(error: BaseException) -> str:
    """Why an image cannot be read, in one line."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image that Pillow knows"  # its own words repeat the path
    return getattr(error, "strerror", None) or one_line(error)


def readable(read: Callable[[int], Any], indices: Iterable[int]) -> Iterator[tuple[int, Any]]:
    """(index, what is read) of those images that can be read; `Decoding` names the others."""
    for index in indices:
        with contextlib.suppress(*UNREADABLE):
            yield index, read(index)


@dataclass
class Decoding:
    """One pass over a source. Iterating yields uint8 `[n, C, size, size]` in order, without the unreadable images.

    Those are in `bad` as (index, reason), in order. Raises UserError that names them if they are more than `max_bad`.
    """

    source: Source
    conversion: Conversion
    max_bad: int
    bad: list[tuple[int, str]] = field(default_factory=list)

    def __iter__(self) -> Iterator[Pixels]:
        total = len(self.source)
        starts = iter(range(0, total, _AT_ONCE))
        with (
            ThreadPoolExecutor(num_cores()) as pool,
            bar(f"reading {self.source.name}", total, "images") as progress,
        ):
            pending: deque[Future[tuple[Pixels, list[tuple[int, str]]]]] = deque()
            try:
                # A window bounds the memory: results come in order, and the first may be the slowest.
                while True:
                    while len(pending) < 4 * num_cores() and (start := next(starts, None)) is not None:
                        pending.append(pool.submit(self._some, range(start, min(start + _AT_ONCE, total))))
                    if not pending:
                        return
                    pixels, bad = pending.popleft().result()
                    self.bad.extend(bad)
                    check_bad(self.source, self.bad, self.max_bad)
                    progress.update(len(pixels) + len(bad))
                    yield pixels
            finally:
                for future in pending:
                    future.cancel()

    def _some(self, indices: range) -> tuple[Pixels, list[tuple[int, str]]]:
        pixels, bad = np.empty((len(indices), *self.conversion.shape), np.uint8), []
        row = 0
        for index in indices:
            try:
                pixels[row] = self.conversion(self.source.read(index))
                row += 1
            except UNREADABLE as error:
                bad.append((index, reason(error)))
        return pixels[:row], bad


def check_bad(source: Source, bad: list[tuple[int, str]], max_bad: int) -> None:
    """Raises UserError that names the unreadable images, if there are more than allowed."""
    if len(bad) > max_bad:
        lines = [f"  {source.where(index)}: {why}" for index, why in bad[:10]]
        allowed = "none is allowed" if max_bad == 0 else f"{max_bad} are allowed"
        lines.insert(0, f"unreadable images in {source.name} ({allowed} by data.max_bad_images):")
        raise UserError("\n".join([*lines, "replace or remove them, or raise data.max_bad_images"]))
