"""Which images each step trains on, and which process takes which: functions of (seed, step), with nothing to restore."""

from functools import lru_cache

import torch
from torch import Tensor

from ddpm_ema.keyed_random import Purpose, words


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, size: int) -> Tensor:
    """The permutation of an epoch, int64 `[size]`. The last two are kept, since a batch may reach over the end of an epoch."""
    keys = []
    for positions in torch.arange(size).split(1 << 20):  # the words of few at once
        w0, w1 = words(seed, Purpose.ORDER, epoch, positions, 2).unbind(-1)
        keys.append((w0 << 32) | w1)
    return torch.argsort(torch.cat(keys), stable=True)


def batch_indices(seed: int, step: int, positions: Tensor, batch_size: int, dataset_size: int) -> Tensor:
    """Which image each position of the global batch takes: int64 `[n]` on the CPU.

    Position p of step s (from 0) is item `s * batch_size + p` of the endless sequence of epochs, each a permutation of
    the data set. A batch may reach over the end of an epoch; nothing is dropped and nothing repeated within an epoch.
    """
    items = step * batch_size + positions.cpu()
    epochs = items // dataset_size
    indices = items % dataset_size
    for epoch in sorted(set(epochs.tolist())):
        chosen = epochs == epoch
        indices[chosen] = _epoch_order(seed, epoch, dataset_size)[indices[chosen]]
    return indices


def partition(total: int, rank: int, world_size: int) -> range:
    """The positions that process `rank` of `world_size` owns: contiguous, in order of rank, sizes at most one apart."""
    return range(total * rank // world_size, total * (rank + 1) // world_size)


def micro_batches(positions: range, size: int | None) -> list[range]:
    """`positions` cut into contiguous pieces of at most `size` (None: one piece), sizes at most one apart."""
    pieces = 1 if size is None else max(1, -(-len(positions) // size))
    cuts = [partition(len(positions), piece, pieces) for piece in range(pieces)]
    return [positions[cut.start : cut.stop] for cut in cuts]
