"""A delete-a-group jackknife of a distance between two sets of images: bias removed, standard error, paired differences.

The Fréchet distance of N images is too large by O(1/N). Leaving out one group of images after another shows how it changes
with N, so that its leading bias can be taken away (Quenouille 1956; Efron & Stein 1981), and how it varies from image to
image, which gives its standard error (Tukey 1958). With N images in G groups of m_g, h_g = N / m_g, F of all images and
F_g of all but group g (Busing, Meijer & van der Leeden 1999, "Delete-m jackknife for unequal m", eqs. 3–7):

    pseudo-value     p_g = h_g F − (h_g − 1) F_g
    corrected        J   = Σ m_g/N p_g = G F − Σ (1 − m_g/N) F_g
    variance             1/G Σ (p_g − J)² / (h_g − 1)

The reference may be held fixed ("against these images"), or be a sample of its population, too: then its groups are left out
as well, with pseudo-values q_h, and the two sides, being independent, add up: J_p + J_q − F, with the sum of both variances.
Weights sampled from the same noise are compared group by group: the pseudo-values of F_a − F_b are the differences of theirs,
so what the two share cancels.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy.special import stdtr, stdtrit
from torch import Tensor

from ddpm_ema.errors import UserError
from ddpm_ema.metrics.frechet import FrechetReference
from ddpm_ema.metrics.statistics import check_finite, statistics_of

IMAGES_PER_DIMENSION = 10
"""From here on the 95% interval of a single distance was seen to cover the true one as often as it says (docs/scoring.md)."""


@dataclass(frozen=True)
class Side:
    """The images on one side of a distance: a pseudo-value per group of them, and images per group."""

    pseudo_values: tuple[float, ...]
    counts: tuple[int, ...]

    @property
    def mean(self) -> float:
        return float(np.dot(self.pseudo_values, self.counts)) / sum(self.counts)

    @property
    def variance(self) -> float:
        """Of the mean."""
        ratios = sum(self.counts) / np.array(self.counts)
        return float(np.dot(np.square(np.array(self.pseudo_values) - self.mean), 1 / (ratios - 1))) / len(ratios)


@dataclass(frozen=True)
class Estimate:
    """A number that compares samples with the reference, or the paired difference of two such numbers."""

    plain: float  # of all images
    sides: tuple[Side, ...]  # the samples, and the reference where it is taken for a sample of its population
    warnings: tuple[str, ...] = ()  # sentences that belong beside the number

    @cached_property
    def unbiased(self) -> float:
        """With the leading bias removed; may be negative."""
        return sum(side.mean for side in self.sides) - (len(self.sides) - 1) * self.plain

    @cached_property
    def stderr(self) -> float:
        """Standard error of `unbiased`."""
        return math.sqrt(sum(side.variance for side in self.sides))

    @property
    def counts(self) -> tuple[int, ...]:
        """Samples per group."""
        return self.sides[0].counts

    @property
    def _freedom(self) -> int:
        """Degrees of freedom of Student's t: one below the groups."""
        return min(len(side.counts) for side in self.sides) - 1

    def interval(self, level: float = 0.05) -> tuple[float, float]:
        """Leaves the true value out with probability `level`."""
        half = float(stdtrit(self._freedom, 1 - level / 2)) * self.stderr
        return self.unbiased - half, self.unbiased + half

    @property
    def p_above(self) -> float:
        """One-sided p-value: how probable so large a value is where the true one is 0 or less."""
        value, stderr = self.unbiased, self.stderr
        if stderr == 0:  # the same images
            return 0.0 if value > 0 else 1.0
        return float(stdtr(self._freedom, -value / stderr))

    @property
    def p_value(self) -> float:
        """Two-sided: how probable a value so far from 0 is where the true one is 0."""
        if self.stderr == 0:
            return float(self.unbiased == 0)
        return float(2 * stdtr(self._freedom, -abs(self.unbiased) / self.stderr))

    def to_dict(self) -> dict[str, Any]:
        """Plain objects, as JSON gives them back."""
        sides = [{"pseudo_values": list(side.pseudo_values), "counts": list(side.counts)} for side in self.sides]
        return {"plain": self.plain, "sides": sides, "warnings": list(self.warnings)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Estimate:
        """What `to_dict` gave. Raises KeyError or TypeError for anything else."""
        sides = tuple(Side(tuple(side["pseudo_values"]), tuple(side["counts"])) for side in values["sides"])
        return cls(values["plain"], sides, tuple(values["warnings"]))


def estimate_distance(
    features: Tensor,
    indices: Tensor,
    groups: int,
    reference: FrechetReference,
    *,
    sampled_from: Tensor | None = None,
    name: str = "features",
) -> Estimate:
    """Jackknife of the Fréchet distance from features held in memory. The work is done on the reference's device.

    Features are taken through L, L Lᵀ = Σ_ref, once. With fewer images than dimensions the nonzero eigenvalues of Lᵀ Σ L
    are those of the n × n Gram matrix; otherwise the d × d sums of a left-out group are taken from those of all.

    Args:
        features: float32 `[n, d]`.
        indices: of the images, int64 `[n]`; an image's group is its index modulo `groups`, and each is left out once.
        sampled_from: the reference's features, float32 `[m, d]`, where it is to be taken for a sample of its population, drawn
            independently of these features; None where it is held fixed.

    Raises:
        UserError: features that are not finite, or fewer than 2 images beside any one group.
    """
    check_finite(features, indices, name=name)
    if features.shape != (len(indices), len(reference.mu)):
        raise ValueError(f"features must be [{len(indices)}, {len(reference.mu)}], got {tuple(features.shape)}")
    plain, samples = _leave_out(features, indices.cpu() % groups, reference)
    sides, fewest = [samples], len(features)
    if sampled_from is not None:
        # The distance is symmetric: the samples are the side that is held fixed while the reference's groups are left out.
        fixed = FrechetReference(statistics_of(features, name=name), reference.device)
        sides.append(_leave_out(sampled_from, torch.arange(len(sampled_from)) % groups, fixed)[1])
        fewest = min(fewest, len(sampled_from))
    return Estimate(plain, tuple(sides), tuple(_doubts(fewest, features.shape[1])))


def difference(a: Estimate, b: Estimate) -> Estimate:
    """Paired difference a − b of two sets of weights over the same images. Raises ValueError where their groups differ."""
    if [side.counts for side in a.sides] != [side.counts for side in b.sides]:
        raise ValueError(
            f"{sum(a.counts)} and {sum(b.counts)} images in groups {a.counts} and {b.counts} cannot be paired"
        )
    pairs = zip(a.sides, b.sides, strict=True)
    sides = [Side(tuple(np.subtract(x.pseudo_values, y.pseudo_values).tolist()), x.counts) for x, y in pairs]
    return Estimate(a.plain - b.plain, tuple(sides))


def _leave_out(features: Tensor, membership: Tensor, fixed: FrechetReference) -> tuple[float, Side]:
    """The plain distance, and the pseudo-values of the groups of these features, the other side held fixed."""
    counts = group_counts(membership)
    if len(features) - max(counts.values()) < 2:
        raise UserError(
            f"error bars need at least 2 images beside any one group, and on one side are {len(features)} images in "
            f"{len(counts)} groups: raise --evaluation.num-images, or take a larger reference"
        )

    def rows(group: int) -> Tensor:  # made when asked for: all of them in float64 would be twice the features' memory
        return features[(membership == group).to(features.device)].to(fixed.device).double() - fixed.mu

    path = _GramPath if len(features) <= len(fixed.mu) else _SumPath
    return jackknife(path(rows, list(counts), fixed).distance, counts)


def group_counts(membership: Tensor) -> dict[int, int]:
    """Group -> images, of those that have some."""
    present, counts = membership.unique(return_counts=True)
    return dict(zip(present.tolist(), counts.tolist(), strict=True))


def jackknife(
    statistic: Callable[[int | None], float], counts: Mapping[int, int], corrected: bool = True
) -> tuple[float, Side]:
    """The statistic of all images, and one pseudo-value per group (formulas at the head of this file).

    `statistic` is of all images but a group, or of all for None; `counts`: group -> images. Pseudo-values that are not `corrected`,
    of a statistic without a bias of order 1/N, are moved to have it as their mean.
    """
    plain, ratios = statistic(None), {group: sum(counts.values()) / count for group, count in counts.items()}
    pseudo = [ratio * plain - (ratio - 1) * statistic(group) for group, ratio in ratios.items()]
    side = Side(tuple(pseudo), tuple(counts.values()))
    return plain, side if corrected else Side(tuple(p + plain - side.mean for p in pseudo), side.counts)


def _doubts(fewest: int, dim: int) -> Iterator[str]:
    """What is wrong with a distance of so few images on its smaller side."""
    if fewest <= dim:
        yield (
            f"{fewest} images for {dim} feature dimensions: the covariance is singular and even the corrected distance is "
            "too small or too large by more than its error; differences between averages are safer"
        )
    elif fewest < IMAGES_PER_DIMENSION * dim:
        yield (
            f"{fewest} images for {dim} feature dimensions: below {IMAGES_PER_DIMENSION} per dimension the 95% interval of a "
            "distance of its own misses the true one too often; differences between averages are right"
        )


class _SumPath:
    """Left-out distances by subtracting a group's whitened d × d sums from those of all images."""

    def __init__(self, rows: Callable[[int], Tensor], groups: Sequence[int], reference: FrechetReference) -> None:
        self.rows, self.reference = rows, reference
        self.sums = self._sums(groups)

    def _sums(self, groups: Sequence[int]) -> tuple[int, Tensor, float, Tensor]:
        """n, Σ(x−c), Σ|x−c|² and Σ Lᵀ(x−c)(x−c)ᵀL with c the reference's mean."""
        factor = self.reference.factor
        count, total, squares, outer = 0, torch.zeros_like(factor[0]), 0.0, torch.zeros_like(factor)
        for rows in map(self.rows, groups):
            whitened = rows @ factor
            count += len(rows)
            total += rows.sum(dim=0)
            squares += float(rows.square().sum())
            outer.addmm_(whitened.T, whitened)
        return count, total, squares, outer

    def distance(self, leave_out: int | None) -> float:
        less = self._sums([] if leave_out is None else [leave_out])
        count, total, squares, outer = map(operator.sub, self.sums, less)
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
        offset = rows.mean(dim=0)
        trace = float((rows - offset).square().sum()) / (count - 1)
        gram = gram - gram.mean(dim=0) - gram.mean(dim=1, keepdim=True) + gram.mean()
        return self.reference.of_parts(float(offset @ offset), trace, gram / (count - 1))
