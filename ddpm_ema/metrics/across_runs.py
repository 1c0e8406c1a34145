"""Runs that differ in their training seed alone: which differences from raw hold, and how much the seed adds.

The measured distance of weights w in run r is d = D_w + T_rw + e_rw: its mean over training seeds, what this seed adds, and an
error of sampling. The runs are scored from the same noise and with the same reference, and networks of different seeds make much
the same image of the same noise, so their e are alike: se² is their mean variance within a run, c their mean covariance between
two runs, both from the pseudo-values of the groups, which are the same images in all runs. Over R runs, the sample variance S² of d
estimates Var(T) + se² - c, the method of moments of a random-effects meta-analysis (DerSimonian & Laird 1986, with equal
weights). So the mean of the runs has the variance

    Var(T) / R + se² / R + c (R - 1) / R = S² / R + c

The same holds for a paired difference from raw, d_w - d_raw, in which what w and raw share of a seed cancels.

A difference holds across runs where its mean over this standard error says so, by Student's t with Holm's correction over the
averages. Its degrees of freedom are Satterthwaite's (1946), at least R - 1: S² has R - 1, and the variance of what the groups
share one less than there are groups.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from ddpm_ema.metrics.comparisons import ALPHA, holm
from ddpm_ema.metrics.jackknife import Estimate, Side, difference


@dataclass(frozen=True)
class Spread:
    """Mean over R runs, with the variance between them split."""

    mean: float
    stderr: float  # of the mean: other seeds, other noise, and other images of the reference where it is a sample
    freedom: float  # degrees of freedom of that error
    sampling_std: float  # root mean square of the standard errors within a run
    training_std: float  # what the training seed adds; 0 where the runs spread no more than sampling explains

    @property
    def p_value(self) -> float:
        """Two-sided: how probable a mean so far from 0 is where the true one is 0."""
        if self.stderr == 0.0:
            return 1.0 if self.mean == 0.0 else 0.0
        return float(2 * stats.t.sf(abs(self.mean) / self.stderr, self.freedom))


@dataclass(frozen=True)
class AcrossRuns:
    """One set of weights over R runs; raw has a distance alone."""

    distance: Spread  # bias-corrected
    difference: Spread | None = None  # paired, from raw
    p_value: float | None = None  # of that difference, two-sided, Holm-adjusted over the averages
    holds: bool | None = None  # p_value <= 0.05


def spread(estimates: Sequence[Estimate]) -> Spread:
    """Splits the variance of one estimate per run, of at least two runs whose groups have the same images.

    Raises ValueError where the groups differ.
    """
    runs, values = len(estimates), [estimate.unbiased for estimate in estimates]
    total = float(np.var(values, ddof=1))
    within, between, doubt = 0.0, 0.0, (total / runs) ** 2 / (runs - 1)
    for sides in zip(*(estimate.sides for estimate in estimates), strict=True):
        if len({side.counts for side in sides}) > 1:
            raise ValueError(f"groups of different images cannot be read together: {[side.counts for side in sides]}")
        mean = Side(tuple(np.mean([side.pseudo_values for side in sides], axis=0)), sides[0].counts)
        apart, alike = float(np.mean([side.variance for side in sides])), mean.variance
        within, between = within + apart, between + (runs * alike - apart) / (runs - 1)
        doubt += (runs * alike / (runs - 1)) ** 2 / (len(mean.counts) - 1)
    between = max(0.0, between)
    variance = total / runs + between
    freedom = max(runs - 1.0, variance**2 / doubt) if doubt else runs - 1.0
    training = max(0.0, total - within + between)
    return Spread(float(np.mean(values)), variance**0.5, freedom, within**0.5, training**0.5)


def across_runs(runs: Sequence[Mapping[str, Estimate]]) -> dict[str, AcrossRuns]:
    """What R runs say together, by weights, of those that every run scored: at least two runs, each with raw.

    `runs` has of each the distances by weights, over the same noise and the same reference.

    Raises:
        ValueError: too few runs, no raw, or groups of different images.
    """
    if len(runs) < 2 or any("raw" not in run for run in runs):
        raise ValueError("runs: needs at least two, each with raw scored")
    common = [name for name in runs[0] if all(name in run for run in runs)]
    distances = {name: spread([run[name] for run in runs]) for name in common}
    averages = [name for name in common if name != "raw"]
    differences = {name: spread([difference(run[name], run["raw"]) for run in runs]) for name in averages}
    p_values = holm({name: gap.p_value for name, gap in differences.items()})
    found = {name: AcrossRuns(distance) for name, distance in distances.items()}
    for name in averages:
        found[name] = AcrossRuns(distances[name], differences[name], p_values[name], p_values[name] <= ALPHA)
    return found
