"""Worker processes that decode the next images, and leave signals to the process that trains."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Generator, Iterable, Iterator
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
    """Decodes a batch of indices. Returns a UserError instead of raising it, which would add the worker's traceback."""

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


def _end_with_parent(worker: int) -> None:
    """Ends this worker when the process that started it is gone.

    PyTorch's own watch looks up its parent when the worker first runs, which may be too late.
    """
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Blocks SIGTERM and SIGINT in processes started inside: schedulers and terminals send these to the whole group.

    A mask is inherited from the first instruction on; a handler set by the worker would come too late. Workers end when their
    loader is closed, or when their parent is gone.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Running:
    """A DataLoader with its workers, which must be closed: they ignore the signal that ends processes at exit."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        before = set(multiprocessing.active_children())
        with _signals_held():
            self.batches = iter(loader)
        self._processes = set(multiprocessing.active_children()) - before
        _running.add(self)

    def close(self) -> None:
        """Ends the workers, by force if they do not answer."""
        if self._processes:
            self.batches._shutdown_workers()  # type: ignore[attr-defined]  # what its __del__ calls, whenever that is
        for process in self._processes:
            if process.is_alive():
                process.kill()
        self._processes.clear()


_running: weakref.WeakSet[_Running] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Closes at exit what an exception's traceback kept open, before multiprocessing waits for its workers."""
    for running in list(_running):
        running.close()


def stream(
    source: Source, conversion: Conversion, index_batches: Iterable[list[int]], num_workers: int
) -> Generator[Tensor, None, None]:
    """Decodes batches in the background.

    Args:
        source: where the images come from.
        conversion: what they are turned into.
        index_batches: lists of source indices; may be endless.
        num_workers: processes; 0 decodes in this one.

    Yields:
        uint8 `[n, C, H, W]` per list, in order. Workers run from the first batch to the last, an error, or `close`.

    Raises:
        UserError: names an unreadable image.
    """
    loader: DataLoader[Any] = DataLoader(
        _Decoder(source, conversion),
        batch_sampler=_Batches(index_batches),
        num_workers=num_workers,
        prefetch_factor=4 if num_workers else None,
        collate_fn=_unchanged,
        worker_init_fn=_end_with_parent,
    )
    running = _Running(loader)
    try:
        for batch in running.batches:
            if isinstance(batch, UserError):
                raise batch
            yield batch
    finally:
        running.close()
