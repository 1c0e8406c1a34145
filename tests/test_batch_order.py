"""Each image comes once per epoch, and no batch depends on how it is split over processes and micro-batches."""

import pytest
import torch

from ddpm_ema.batch_order import batch_indices, micro_batches, partition


def epoch(seed: int, number: int, size: int) -> torch.Tensor:
    """The order of one epoch: with a batch as large as the data set, a step is an epoch."""
    return batch_indices(seed, number, torch.arange(size), size, size)


def test_an_epoch_is_a_permutation_and_epochs_differ() -> None:
    orders = [epoch(0, number, 1000) for number in range(3)]
    for order in orders:
        assert torch.equal(order.sort().values, torch.arange(1000))
        assert int((order == torch.arange(1000)).sum()) < 10
    assert int((orders[0] == orders[1]).sum()) < 10
    assert not torch.equal(orders[0], epoch(1, 0, 1000))
    assert torch.equal(orders[0], epoch(0, 0, 1000))


@pytest.mark.parametrize(("dataset_size", "batch_size"), [(10, 4), (7, 7), (5, 16), (100, 3)])
def test_every_image_comes_once_an_epoch_also_across_batch_borders(dataset_size: int, batch_size: int) -> None:
    steps = 3 * dataset_size
    positions = torch.arange(batch_size)
    drawn = torch.cat([batch_indices(0, s, positions, batch_size, dataset_size) for s in range(steps)])
    for number, order in enumerate(drawn[: len(drawn) // dataset_size * dataset_size].split(dataset_size)):
        assert torch.equal(order, epoch(0, number, dataset_size))


def test_batch_indices_do_not_depend_on_how_the_batch_is_split() -> None:
    whole = batch_indices(3, 41, torch.arange(24), 24, 50)
    for world_size in (1, 2, 5):
        parts = []
        for rank in range(world_size):
            for piece in micro_batches(partition(24, rank, world_size), 3):
                parts.append(batch_indices(3, 41, torch.arange(piece.start, piece.stop), 24, 50))
        assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize(("total", "world_size"), [(0, 1), (7, 3), (128, 8), (3, 5)])
def test_partition_is_contiguous_complete_and_balanced(total: int, world_size: int) -> None:
    shares = [partition(total, rank, world_size) for rank in range(world_size)]
    assert [position for share in shares for position in share] == list(range(total))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("size", [None, 1, 3, 100])
def test_micro_batches_cover_the_share_within_the_bound(size: int | None) -> None:
    pieces = micro_batches(range(10, 20), size)
    assert [position for piece in pieces for position in piece] == list(range(10, 20))
    assert max(map(len, pieces)) <= (size or 10)
    assert len(pieces) == -(-10 // (size or 10))
