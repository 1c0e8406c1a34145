"""Features → how far one set of images is from another, and how sure that is."""

from ddpm_ema.metrics.comparisons import ALPHA, Verdict, against_raw, may_be_best
from ddpm_ema.metrics.frechet import FrechetReference
from ddpm_ema.metrics.jackknife import Estimate, Side, difference, estimate_distance
from ddpm_ema.metrics.kernel import KernelReference
from ddpm_ema.metrics.neighbours import inside, neighbour_radii, precision, recall
from ddpm_ema.metrics.reference import (
    Reference,
    content_key,
    installed_version,
    keep,
    load_cached,
    read_published,
    reference_of,
    with_radii,
)
from ddpm_ema.metrics.statistics import Statistics, check_finite, not_finite, statistics_of
