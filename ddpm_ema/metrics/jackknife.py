"""A delete-a-group jackknife of the Fréchet distance: its bias removed, its standard error, paired differences.

The Fréchet distance of N images is too large by O(1/N). Leaving out one group of images after another shows how it changes
with N, so that its leading bias can be taken away (Quenouille 1956; Efron & Stein 1981), and how it varies from image to
image, which gives its standard error (Tukey 1958). With N images in G groups of m_g, h_g = N / m_g, F of all images and
F_g of all but group g (Busing, Meijer & van der Leeden 1999, "Delete-m jackknife for unequal m", eqs. 3–7):

    pseudo-value     p_g = h_g F − (h_g − 1) F_g
    corrected        J   = G F − Σ (1 − m_g/N) F_g
    variance             1/G Σ (p_g − J)² / (h_g − 1)

For equal groups these are the textbook's p_g = G F − (G−1) F_g, their mean, and their variance over G. Weights sampled from
the same noise are compared group by group: their difference is the jackknife of F_a − F_b, whose pseudo-values are the
differences of theirs, so what the two share cancels. The reference is held fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm_ema.errors import UserError
from ddpm_ema.metrics.frechet import FrechetReference
from ddpm_ema.metrics.statistics import check_finite

IMAGES_PER_DIMENSION = 10
"""From here on `interval95` of a single distance was seen to cover the true one as often as it says (docs/scoring.md)."""


@dataclass(frozen=True)
class Estimate:
    """The Fréchet distance of the samples of one set of weights.

    Attributes:
        distance: plain, of all images.
        unbiased: with the leading bias removed; may be negative.
        stderr: standard error of `unbiased`.
        interval95: its 95% interval.
        pseudo_values: one per group of images; they pair it with other estimates.
        counts: images per group.
        warnings: sentences that belong beside the number.
    """

    distance: float
    unbiased: float
    stderr: float
    interval95: tuple[float, float]
    pseudo_values: tuple[float, ...]
    counts: tuple[int, ...]
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able objects, for results.json."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Estimate:
        """What `to_dict` gave."""
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**fields)


@dataclass(frozen=True)
class Difference:
    """a − b: `delta` of the unbiased distances, its standard error and 95% interval, and whether zero lies outside it."""

    delta: float
    stderr: float
    interval95: tuple[float, float]
    significant: bool


def estimate_distance(
    features: Tensor, indices: Tensor, groups: int, reference: FrechetReference, *, name: str = "features"
) -> Estimate:
    """Jackknife of the Fréchet distance from features held in memory.

    Features are taken through L, L Lᵀ = Σ_ref, once. With fewer images than dimensions the nonzero eigenvalues of Lᵀ Σ L
    are those of the n × n Gram matrix; otherwise the d × d sums of a left-out group are taken from those of all.

    Args:
        features: float32 `[n, d]`.
        indices: of the images, int64 `[n]`; an image's group is its index modulo `groups`.
        groups: number of groups, each left out once.
        reference: the other side; the work is done on its device.
        name: of the weights, for messages.

    Raises:
        UserError: features that are not finite, fewer than 2 images, or images in fewer than 2 groups.
    """
    check_finite(features, indices, name=name)
    if features.shape != (len(indices), len(reference.mu)):
        raise ValueError(f"features must be [{len(indices)}, {len(reference.mu)}], got {tuple(features.shape)}")
    membership = (indices.cpu() % groups).long()
    present = membership.unique().tolist()
    _check_groups(len(features), present)
    counts = {g: int((membership == g).sum()) for g in present}
    members = {g: (membership == g).nonzero().squeeze(1).to(features.device) for g in present}

    def rows(group: int) -> Tensor:  # made when asked for: all of them in float64 would be twice the features' memory
        return features[members[group]].to(reference.device).double() - reference.mu

    path = _GramPath if len(features) <= len(reference.mu) else _SumPath
    return _estimate(path(rows, present, reference).distance, counts, len(reference.mu))


def difference(a: Estimate, b: Estimate) -> Difference:
    """Paired difference a − b of two sets of weights over the same images. Raises ValueError where their groups differ."""
    if a.counts != b.counts:
        raise ValueError(
            f"{sum(a.counts)} and {sum(b.counts)} images in groups {a.counts} and {b.counts} cannot be paired"
        )
    pseudo = np.subtract(a.pseudo_values, b.pseudo_values)
    delta = a.unbiased - b.unbiased
    stderr = _stderr(pseudo, delta, a.counts)
    low, high = _interval(delta, stderr, len(pseudo))
    return Difference(delta=delta, stderr=stderr, interval95=(low, high), significant=not low <= 0.0 <= high)


def _check_groups(count: int, groups: Sequence[int]) -> None:
    if count < 2:
        raise UserError(f"scoring needs at least 2 images and there are {count}: raise --evaluation.num-images")
    if len(groups) < 2:
        raise UserError(f"error bars need images in at least 2 groups: {count} images fill {len(groups)}")


def _estimate(distance: Callable[[int | None], float], counts: Mapping[int, int], dim: int) -> Estimate:
    """The formulas at the head of this file, from `distance(None)` and `distance(g)`."""
    total = sum(counts.values())
    sizes = np.array(list(counts.values()), dtype=np.float64)
    plain = distance(None)
    without = np.array([distance(group) for group in counts])
    ratios = total / sizes
    unbiased = float(len(sizes) * plain - np.sum((1 - sizes / total) * without))
    pseudo = ratios * plain - (ratios - 1) * without
    stderr = _stderr(pseudo, unbiased, tuple(counts.values()))
    warnings = []
    if total <= dim:
        warnings.append(
            f"{total} images for {dim} feature dimensions: the covariance is singular and even the corrected distance is "
            "too small or too large by more than its error; differences between averages are safer"
        )
    elif total < IMAGES_PER_DIMENSION * dim:
        warnings.append(
            f"{total} images for {dim} feature dimensions: below {IMAGES_PER_DIMENSION} per dimension the 95% interval of a "
            "distance of its own misses the true one too often; differences between averages are right"
        )
    return Estimate(
        distance=plain,
        unbiased=unbiased,
        stderr=stderr,
        interval95=_interval(unbiased, stderr, len(sizes)),
        pseudo_values=tuple(pseudo.tolist()),
        counts=tuple(counts.values()),
        warnings=tuple(warnings),
    )


def _stderr(pseudo: np.ndarray, centre: float, counts: Sequence[int]) -> float:
    ratios = sum(counts) / np.asarray(counts, dtype=np.float64)
    return float(np.sqrt(np.mean((pseudo - centre) ** 2 / (ratios - 1))))


def _interval(centre: float, stderr: float, groups: int) -> tuple[float, float]:
    """95%, by Student's t with groups − 1 degrees of freedom."""
    from scipy.stats import t

    half = float(t.ppf(0.975, groups - 1)) * stderr
    return centre - half, centre + half


class _SumPath:
    """Left-out distances by subtracting a group's whitened d × d sums from those of all images."""

    def __init__(self, rows: Callable[[int], Tensor], groups: Sequence[int], reference: FrechetReference) -> None:
        self.rows, self.reference = rows, reference
        self.count, self.total, self.squares, self.outer = self._sums(groups)

    def _sums(self, groups: Sequence[int]) -> tuple[int, Tensor, float, Tensor]:
        """n, Σ(x−c), Σ|x−c|² and Σ Lᵀ(x−c)(x−c)ᵀL with c the reference's mean."""
        factor = self.reference.factor
        count, total, squares, outer = 0, torch.zeros_like(factor[0]), 0.0, torch.zeros_like(factor)
        for group in groups:
            rows = self.rows(group)
            whitened = rows @ factor
            count += len(rows)
            total += rows.sum(dim=0)
            squares += float(rows.square().sum())
            outer.addmm_(whitened.T, whitened)
        return count, total, squares, outer

    def distance(self, leave_out: int | None) -> float:
        count, total, squares, outer = self.count, self.total, self.squares, self.outer
        if leave_out is not None:
            sums = self._sums([leave_out])
            count, total, squares, outer = count - sums[0], total - sums[1], squares - sums[2], outer - sums[3]
        offset = total / count
        whitened_offset = offset @ self.reference.factor
        sigma = (outer - count * torch.outer(whitened_offset, whitened_offset)) / (count - 1)
        trace = (squares - count * float(offset @ offset)) / (count - 1)
        return self.reference.of_parts(float(offset @ offset), trace, sigma)


class _GramPath:
    """Left-out distances from the n × n Gram matrix of whitened features, rows of a group struck out, then centred."""

    def __init__(self, rows: Callable[[int], Tensor], groups: Sequence[int], reference: FrechetReference) -> None:
        self.reference = reference
        parts = {group: rows(group) for group in groups}
        self.rows = torch.cat(list(parts.values()))
        self.groups = torch.cat([torch.full((len(part),), group) for group, part in parts.items()]).to(reference.device)
        whitened = self.rows @ reference.factor
        self.gram = whitened @ whitened.T

    def distance(self, leave_out: int | None) -> float:
        kept = self.groups != (-1 if leave_out is None else leave_out)
        rows, gram = self.rows[kept], self.gram[kept][:, kept]
        count = len(rows)
        if count < 2:
            raise UserError("scoring needs at least 2 images beside any one group: raise --evaluation.num-images")
        offset = rows.mean(dim=0)
        trace = float((rows - offset).square().sum()) / (count - 1)
        gram = gram - gram.mean(dim=0) - gram.mean(dim=1, keepdim=True) + gram.mean()
        return self.reference.of_parts(float(offset @ offset), trace, gram / (count - 1))
