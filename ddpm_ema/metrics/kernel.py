"""KID: the squared maximum mean discrepancy of a cubic polynomial kernel (Bińkowski et al. 2018), with its error by jackknife.

k(x, y) = (x·y / d + 1)³. The mean over subsets that published figures are is an estimate of the same number, from fewer pairs.
"""

import torch
from torch import Tensor

from ddpm_ema.metrics.jackknife import Estimate, group_counts, jackknife
from ddpm_ema.metrics.nearest import in_parts


class KernelReference:
    """One side of the kernel distance, with the kernel between its own images summed once.

    `features`: float32 `[m, d]`; `population`: they are a sample of it, whose error is part of every estimate.
    """

    def __init__(self, features: Tensor, groups: int, population: bool = False) -> None:
        self.features, self.population = features, population
        self.membership = torch.arange(len(features)) % groups
        self.sums = _sums(features, self.membership, features, self.membership)

    def estimate(self, features: Tensor, membership: Tensor) -> Estimate:
        """Unbiased, so it may be below zero, of features float32 `[n, d]` on the device where the work is done, in groups `[n]`."""
        _, membership = membership.cpu().unique(return_inverse=True)
        counts, others = group_counts(membership), group_counts(self.membership)
        within = _sums(features, membership, features, membership)
        across = _sums(features, membership, self.features, self.membership)

        def distance(g: int | None, h: int | None) -> float:
            """Without group g of these images and group h of the reference."""
            a, b = _kept(counts, g), _kept(others, h)
            n, m = (sum(c for k, c in of.items() if k != left) for of, left in ((counts, g), (others, h)))
            same = a @ within @ a / (n * (n - 1)) + b @ self.sums @ b / (m * (m - 1))
            return float(same - 2 * (a @ across @ b) / (n * m))

        plain, side = jackknife(lambda g: distance(g, None), counts, corrected=False)
        more = [jackknife(lambda h: distance(None, h), others, corrected=False)[1]] if self.population else []
        return Estimate(plain, (side, *more))


def _kept(counts: dict[int, int], left_out: int | None) -> Tensor:
    """1 for each group but the one that is left out: float64 [G]."""
    return torch.tensor([float(group != left_out) for group in counts], dtype=torch.float64)


def _sums(a: Tensor, groups_a: Tensor, b: Tensor, groups_b: Tensor) -> Tensor:
    """The kernel summed over the pairs of every two groups, without those of an image and itself: float64 [G, H]."""
    found = torch.zeros(int(groups_a.max()) + 1, int(groups_b.max()) + 1, dtype=torch.float64)
    others = b.to(a.device)
    for group in range(len(found)):
        columns = torch.zeros(len(b), dtype=torch.float64)
        for part in in_parts(a[(groups_a == group).to(a.device)], b):
            columns += ((part @ others.T / a.shape[1] + 1) ** 3).sum(dim=0, dtype=torch.float64).cpu()
        found[group].index_add_(0, groups_b, columns)
    if a is b:
        alone = (a.double().square().sum(dim=1).cpu() / a.shape[1] + 1) ** 3
        found.diagonal().index_add_(0, groups_a, -alone)
    return found
