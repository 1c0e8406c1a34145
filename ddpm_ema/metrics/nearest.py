"""Which training images samples lie nearest to, and whether nearer than images that training never saw.

The latter is Meehan, Chaudhuri & Dasgupta 2020. Distances are Euclidean, between features.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

PAIRS = 2**28  # numbers of a matrix held at once: 1 GiB
COLUMNS = 10_000  # of which distances are computed at once: torch.cdist copies them at each call


def in_parts(rows: Tensor, columns: Tensor) -> tuple[Tensor, ...]:
    """The rows `[n, d]` in parts, such that a matrix of one part by all `columns` `[m, d]` is small enough to be held."""
    return rows.split(max(1, min(1024, PAIRS // len(columns))))


def distances(rows: Tensor, columns: Tensor) -> Iterator[Tensor]:
    """Euclidean, from part after part of the rows `[n, d]` to all columns `[m, d]`: fp32 `[r, m]`."""
    for part in in_parts(rows, columns):
        yield torch.cat([torch.cdist(part, some) for some in columns.split(COLUMNS)], dim=1)


def nearest(features: Tensor, reference: Tensor) -> Tensor:
    """Distance from each of `features` [n, d] to its nearest neighbour among `reference` [m, d]: fp32 [n], on the CPU.

    Works on the features' device.
    """
    reference = reference.to(features.device)
    return torch.cat([apart.amin(dim=1).cpu() for apart in distances(features, reference)])


def nearest_of(points: Tensor, batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Distance and place of the nearest neighbour of each of a few `points` [n, d]: float64 [n], int64 [n], on the CPU.

    Works on the points' device in float64, in which a copy has distance 0 but for rounding.

    Args:
        points: features, or pixels as numbers.
        batches: [m, d] each; a place counts through all of them.
    """
    points = points.double()
    distances = points.new_full((len(points),), torch.inf)
    places, start = torch.zeros(len(points), dtype=torch.int64, device=points.device), 0
    for batch in batches:
        found = torch.cdist(points, batch.to(points)).min(dim=1)
        nearer = found.values < distances
        distances[nearer], places[nearer] = found.values[nearer], found.indices[nearer] + start
        start += len(batch)
    return distances.cpu(), places.cpu()


def nearer_to_training(samples: Tensor, held_out: Tensor) -> float:
    """The probability that a sample lies nearer to a training image than a held-out image does: the Mann-Whitney statistic.

    One half for samples that are as new as the held-out images, 1 for copies of the training images. Both are given as distances to
    the nearest training image, fp32 [n] and [m].
    """
    ordered = held_out.sort().values
    farther = len(ordered) - torch.searchsorted(ordered, samples, right=True)
    not_nearer = len(ordered) - torch.searchsorted(ordered, samples)
    return float((farther + not_nearer).double().mean()) / (2 * len(ordered))
