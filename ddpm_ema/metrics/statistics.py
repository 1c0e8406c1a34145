"""Means and covariances of features, in float64."""

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


def check_finite(features: Tensor, indices: Tensor, *, name: str) -> None:
    """Raises UserError that names the weights and the first image whose row of `features` `[n, d]` is NaN or infinite."""
    bad = ~torch.isfinite(features).all(dim=1).cpu()
    if bad.any():
        raise not_finite(name, "features", indices.cpu()[bad].tolist(), len(features))


def not_finite(name: str, what: str, images: list[int], count: int) -> UserError:
    """The error for `what` of some `images`, among `count`, that were made with the weights called `name`."""
    return UserError(
        f"{name}: the {what} of image {images[0]} are not finite ({len(images)} of {count} images here). The weights of {name} "
        "are broken or overflow in this precision: look at its samples, try --evaluation.mixed-precision no, or leave it out of "
        "--evaluation.weights (while training: --evaluation.every 0)"
    )


def statistics_of(features: Tensor, *, name: str = "features") -> Statistics:
    """Mean and covariance of features, float32 `[n, d]`. Raises UserError for fewer than 2 images, or where some are not finite."""
    check_finite(features, torch.arange(len(features)), name=name)
    count = len(features)
    if count < 2:
        raise UserError(f"{name}: a covariance needs at least 2 images and there are {count}")
    # Sums are taken about a point nearby: far from the origin the covariance is a small difference of large sums.
    shift = features[:1024].double().mean(dim=0).cpu()
    total, outer = torch.zeros_like(shift), torch.zeros(len(shift), len(shift), dtype=torch.float64)
    for rows in features.split(8192):
        centred = rows.cpu().double() - shift
        total += centred.sum(dim=0)
        outer.addmm_(centred.T, centred)
    offset = total / count
    sigma = (outer - torch.outer(offset, total)) / (count - 1)
    return Statistics(mu=shift + offset, sigma=sigma, count=count)
