"""Means and covariances of features, streamed in float64, group by group, so that leaving a group out is a subtraction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_ema.errors import UserError


@dataclass(frozen=True)
class Statistics:
    """Mean float64 [d], unbiased covariance float64 [d, d] and the number of images they are made of."""

    mu: Tensor
    sigma: Tensor
    count: int


def check_finite(values: Tensor, image_indices: Tensor, *, copy: str, what: str = "features") -> None:
    """Raises UserError that names the copy and the first image whose row of `values` [n, ...] is NaN or infinite."""
    bad = ~torch.isfinite(values.reshape(len(values), -1)).all(dim=1).cpu()
    if bad.any():
        images = image_indices.cpu()[bad].tolist()
        raise UserError(
            f"{copy}: the {what} of image {images[0]} are not finite ({len(images)} of {len(values)} images here). "
            f"The weights of {copy} are broken or overflow in this precision: look at its samples, try "
            "--evaluation.mixed-precision no, or leave it out of --evaluation.weights"
        )


class Moments:
    """Sums over images in `groups` groups: how many, of features, of their outer products.

    An image's group is its index modulo `groups`: it depends neither on processes nor on batches. Sums are taken about
    `shift` (float64 [dim]; the reference's mean is a good one): with data far from the origin the covariance would
    otherwise be a small difference of large sums. Memory is 8·groups·dim² bytes (0.7 GB at 20 groups of 2048
    dimensions); where the features themselves are kept, `jackknife.estimate_features` does without.
    """

    def __init__(self, dim: int, groups: int = 1, shift: Tensor | None = None) -> None:
        if dim < 1 or groups < 1:
            raise ValueError(f"dim and groups must be at least 1, got {dim} and {groups}")
        self.dim, self.groups = dim, groups
        self.shift = torch.zeros(dim, dtype=torch.float64) if shift is None else shift.detach().cpu().double().clone()
        if self.shift.shape != (dim,):
            raise ValueError(f"shift must have shape ({dim},), got {tuple(self.shift.shape)}")
        self.counts = torch.zeros(groups, dtype=torch.int64)
        self.sums = torch.zeros(groups, dim, dtype=torch.float64)
        self.outer = torch.zeros(groups, dim, dim, dtype=torch.float64)

    def update(self, features: Tensor, image_indices: Tensor, *, copy: str = "features") -> None:
        """Adds `features` [n, dim] of the images `image_indices` (int64 [n]). Each image must be added once.

        Raises ValueError for a wrong shape, UserError (with `copy` and the image) for features that are not finite.
        """
        if features.ndim != 2 or features.shape[1] != self.dim or image_indices.shape != features.shape[:1]:
            raise ValueError(
                f"features must be [n, {self.dim}] with n indices, "
                f"got {tuple(features.shape)} and {tuple(image_indices.shape)}"
            )
        check_finite(features, image_indices, copy=copy)
        groups = image_indices.cpu() % self.groups
        centred = features.detach().cpu().double() - self.shift  #                                          [n, d]
        for group in groups.unique().tolist():
            rows = centred[groups == group]
            self.counts[group] += len(rows)
            self.sums[group] += rows.sum(dim=0)
            self.outer[group].addmm_(rows.T, rows)

    def merge(self, other: Moments) -> None:
        """Adds the sums of other images (another process, another block). Same dim, groups and shift: ValueError."""
        if (self.dim, self.groups) != (other.dim, other.groups):
            raise ValueError(
                f"{self.groups} groups of dimension {self.dim} do not add to {other.groups} of {other.dim}"
            )
        if not torch.equal(self.shift, other.shift):
            raise ValueError("moments taken about different shifts do not add")
        self.counts += other.counts
        self.sums += other.sums
        self.outer += other.outer

    @property
    def count(self) -> int:
        """Number of images."""
        return int(self.counts.sum())

    def statistics(self, leave_out: int | None = None) -> Statistics:
        """Of all images, or of all but those of one group. Raises UserError where fewer than 2 images are left."""
        count, total, outer = self.count, self.sums.sum(dim=0), self.outer.sum(dim=0)
        if leave_out is not None:
            count -= int(self.counts[leave_out])
            total = total - self.sums[leave_out]
            outer = outer - self.outer[leave_out]
        return statistics_of_sums(count, total, outer, self.shift)

    def to_tensors(self) -> dict[str, Tensor]:
        """For a safetensors file; the outer products as packed upper triangles, half their size."""
        rows, columns = torch.triu_indices(self.dim, self.dim)
        return {
            "shift": self.shift,
            "counts": self.counts,
            "sums": self.sums,
            "outer": self.outer[:, rows, columns].contiguous(),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Moments:
        """What `to_tensors` gave. Raises ValueError that names what is missing or misshaped."""
        missing = {"shift", "counts", "sums", "outer"} - set(tensors)
        if missing:
            raise ValueError(f"moments lack {', '.join(sorted(missing))}")
        groups, dim = tensors["sums"].shape
        moments = cls(dim, groups, tensors["shift"])
        rows, columns = torch.triu_indices(dim, dim)
        if tensors["counts"].shape != (groups,) or tensors["outer"].shape != (groups, rows.numel()):
            raise ValueError(
                f"moments of {groups} groups of dimension {dim} with counts {tuple(tensors['counts'].shape)} "
                f"and outer products {tuple(tensors['outer'].shape)}"
            )
        moments.counts.copy_(tensors["counts"])
        moments.sums.copy_(tensors["sums"])
        moments.outer[:, rows, columns] = tensors["outer"].double()
        moments.outer[:, columns, rows] = tensors["outer"].double()
        return moments


def statistics_of_sums(count: int, total: Tensor, outer: Tensor, shift: Tensor) -> Statistics:
    """Mean and unbiased covariance from a count, Σ(x−c) and Σ(x−c)(x−c)ᵀ about the shift c."""
    if count < 2:
        raise UserError(f"a covariance needs at least 2 images and there are {count}: raise --evaluation.num-images")
    offset = total / count
    sigma = (outer - torch.outer(offset, total)) / (count - 1)
    return Statistics(mu=shift + offset, sigma=sigma, count=count)


def statistics_of(features: Tensor, *, copy: str = "features") -> Statistics:
    """Of features [n, d] held in memory. Raises UserError for fewer than 2 images or features that are not finite."""
    check_finite(features, torch.arange(len(features)), copy=copy)
    shift = features[:1024].double().mean(dim=0).cpu() if len(features) else torch.zeros(features.shape[1]).double()
    total, outer = torch.zeros_like(shift), torch.zeros(len(shift), len(shift), dtype=torch.float64)
    for rows in features.split(8192):
        centred = rows.cpu().double() - shift
        total += centred.sum(dim=0)
        outer.addmm_(centred.T, centred)
    return statistics_of_sums(len(features), total, outer, shift)
