"""KID: the squared maximum mean discrepancy of a cubic polynomial kernel (Bińkowski et al. 2018), with its error by jackknife.

k(x, y) = (x·y / d + 1)³. The mean over subsets that published figures are is an estimate of the same number, from fewer pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_ema.errors import UserError
from ddpm_ema.metrics.jackknife import Estimate, jackknife

PAIRS = 2**26  # kernel values held at once: 256 MiB


class KernelReference:
    """One side of the kernel distance, with the kernel between its own images summed once."""

    def __init__(self, features: Tensor, groups: int, population: bool = False) -> None:
        """`features`: float32 `[m, d]`; `population`: they are a sample of it, whose error is part of every estimate."""
        if len(features) < 2:
            raise UserError("the kernel distance needs at least 2 images on both sides: raise --evaluation.num-images")
        self.features, self.population = features, population
        self.membership = torch.arange(len(features)) % groups
        self.sums = _sums(features, self.membership, features, self.membership)

    def estimate(self, features: Tensor, membership: Tensor) -> Estimate:
        """Unbiased, so it may be below zero.

        Args:
            features: float32 `[n, d]`, on the device where the work is done.
            membership: group of each image, int64 `[n]`.

        Raises:
            UserError: fewer than 2 images.
        """
        if len(features) < 2:
            raise UserError("the kernel distance needs at least 2 images on both sides: raise --evaluation.num-images")
        _, membership = membership.cpu().unique(return_inverse=True)
        within, across = (
            _sums(features, membership, features, membership),
            _sums(features, membership, self.features, self.membership),
        )
        sizes, others = membership.bincount().double(), self.membership.bincount().double()

        def distance(kept: Tensor, kept_others: Tensor) -> float:
            """Of the groups that are 1 in both, the others being 0."""
            n, m = float(kept @ sizes), float(kept_others @ others)
            same = kept @ within @ kept / (n * (n - 1)) + kept_others @ self.sums @ kept_others / (m * (m - 1))
            return float(same - 2 * (kept @ across @ kept_others) / (n * m))

        ones, other_ones = torch.ones_like(sizes), torch.ones_like(others)
        plain, side = jackknife(lambda g: distance(_without(ones, g), other_ones), _counts(sizes))
        sides = [side]
        if self.population:
            sides.append(jackknife(lambda h: distance(ones, _without(other_ones, h)), _counts(others))[1])
        return Estimate(plain, tuple(sides))


def _sums(a: Tensor, groups_a: Tensor, b: Tensor, groups_b: Tensor) -> Tensor:
    """The kernel summed over the pairs of every two groups, without those of an image and itself: float64 [G, H]."""
    found = torch.zeros(int(groups_a.max()) + 1, int(groups_b.max()) + 1, dtype=torch.float64)
    others = b.to(a.device)
    for group in range(len(found)):
        columns = torch.zeros(len(b), dtype=torch.float64)
        for rows in (groups_a == group).nonzero().squeeze(1).split(max(1, PAIRS // len(b))):
            part = a[rows.to(a.device)]
            columns += ((part @ others.T / a.shape[1] + 1) ** 3).sum(dim=0, dtype=torch.float64).cpu()
        found[group].index_add_(0, groups_b, columns)
    if a is b:
        alone = (a.double().square().sum(dim=1).cpu() / a.shape[1] + 1) ** 3
        found.diagonal().index_add_(0, groups_a, -alone)
    return found


def _without(ones: Tensor, group: int | None) -> Tensor:
    kept = ones.clone()
    if group is not None:
        kept[group] = 0
    return kept


def _counts(sizes: Tensor) -> dict[int, int]:
    return {group: int(size) for group, size in enumerate(sizes.tolist())}
