"""Images decoded by worker processes ahead of need, which leave signals to the process that trains."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ddpm_ema.data.convert import Conversion
from ddpm_ema.data.decode import decode
from ddpm_ema.data.source import Source
from ddpm_ema.errors import UserError


@dataclass
class _Decoder(Dataset[Tensor]):
    """Decodes a whole batch of indices at once. A user's error is a value here: a raised one would come with the
    worker's traceback."""

    source: Source
    conversion: Conversion

    def __getitems__(self, indices: list[int]) -> Tensor | UserError:
        pixels = np.empty((len(indices), *self.conversion.shape), np.uint8)
        try:
            for row, index in enumerate(indices):
                pixels[row] = decode(self.source, self.conversion, index)
        except UserError as error:
            return error
        return torch.from_numpy(pixels)


@dataclass
class _Batches:
    """A one-shot sampler over lists of indices."""

    batches: Iterable[list[int]]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


def _unchanged(batch: Any) -> Any:
    return batch


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Processes started inside never see SIGTERM or SIGINT, which a scheduler or a terminal sends to all at once.

    A mask is inherited from the first instruction on, where a handler set by the worker would come too late. Workers
    end when they are told to, or when they find their parent gone.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def stream(
    source: Source, conversion: Conversion, index_batches: Iterable[list[int]], num_workers: int
) -> Iterator[Tensor]:
    """uint8 `[n, C, H, W]` for each list of source indices, in order. UserError names an unreadable image."""
    loader: DataLoader[Tensor | UserError] = DataLoader(
        _Decoder(source, conversion),
        batch_sampler=_Batches(index_batches),
        num_workers=num_workers,
        prefetch_factor=4 if num_workers else None,
        collate_fn=_unchanged,
    )
    with _signals_held():
        batches = iter(loader)
    for batch in batches:
        if isinstance(batch, UserError):
            raise batch
        yield batch
