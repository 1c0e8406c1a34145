"""Whether samples lie nearer to the training images than images that training never saw (Meehan, Chaudhuri & Dasgupta 2020).

Distances are Euclidean, between features.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 4096  # of a distance matrix held at once


def nearest(features: Tensor, reference: Tensor) -> Tensor:
    """Distance from each of `features` [n, d] to its nearest neighbour among `reference` [m, d]: fp32 [n], on the CPU.

    Works on the features' device.
    """
    reference = reference.to(features.device)
    return torch.cat([torch.cdist(rows, reference).amin(dim=1).cpu() for rows in features.split(ROWS)])


def nearer_to_training(samples: Tensor, held_out: Tensor) -> float:
    """The probability that a sample lies nearer to a training image than a held-out image does: the Mann-Whitney statistic.

    One half for samples that are as new as the held-out images, 1 for copies of the training images.

    Args:
        samples: distance of each sample to its nearest training image, fp32 [n].
        held_out: of each held-out image, fp32 [m].
    """
    ordered = held_out.sort().values
    farther = len(ordered) - torch.searchsorted(ordered, samples, right=True)
    not_nearer = len(ordered) - torch.searchsorted(ordered, samples)
    return float((farther + not_nearer).double().mean()) / (2 * len(ordered))
