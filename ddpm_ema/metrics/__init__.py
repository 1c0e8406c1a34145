"""Features → how far one set of images is from another, and how sure that is.

`moments` (streamed means and covariances), `frechet` (the distance), `jackknife` (error bars, bias, paired differences), `scores`
(KID, Inception score, precision and recall), `reference` (what samples are compared with, cached by content).
"""

from __future__ import annotations

from ddpm_ema.metrics.frechet import FrechetReference, frechet_distance
from ddpm_ema.metrics.jackknife import Difference, Estimate, difference, estimate, estimate_features, jackknife
from ddpm_ema.metrics.moments import Moments, Statistics, check_finite, statistics_of
from ddpm_ema.metrics.reference import (
    Reference,
    content_key,
    keep,
    load_cached,
    read_published,
    reference_of,
)
from ddpm_ema.metrics.scores import (
    KernelDistance,
    inception_score,
    kernel_distance,
    neighbour_radii,
    precision_recall,
)

__all__ = [
    "Difference",
    "Estimate",
    "FrechetReference",
    "KernelDistance",
    "Moments",
    "Reference",
    "Statistics",
    "check_finite",
    "content_key",
    "difference",
    "estimate",
    "estimate_features",
    "frechet_distance",
    "inception_score",
    "jackknife",
    "keep",
    "kernel_distance",
    "load_cached",
    "neighbour_radii",
    "precision_recall",
    "read_published",
    "reference_of",
    "statistics_of",
]
