"""Runs that differ in their training seed alone: which differences from raw hold, and how much of the spread averages share.

The measured distance of weights w in run r is d = D_w + T_rw + e_rw: its mean over training seeds, what this seed adds, and an
error of sampling whose standard error is known (the jackknife's). Over R runs, the sample variance of d estimates Var(T) + mean
se², so Var(T) is their difference: the method of moments of a random-effects meta-analysis (DerSimonian & Laird 1986, with equal
weights). The same holds for a paired difference from raw, d_w - d_raw, with the paired standard errors. What w and raw share
of a seed cancels in that difference:

    covariance(T_w, T_raw) = (Var(T_w) + Var(T_raw) - Var(T_w - T_raw)) / 2

A difference holds across runs where Student's t of its R values, with R - 1 degrees of freedom and Holm's correction over the
averages, says so. Errors of the samples need no term of their own there: they are part of the spread of the R values. That
of the reference, which the runs share, is not: all this holds against its images, and where se² has its part, Var(T) comes
out too small.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from ddpm_ema.metrics.comparisons import ALPHA, holm


@dataclass(frozen=True)
class Spread:
    """Mean over R runs, with the variance between them split."""

    mean: float
    stderr: float  # of the mean, from the spread of the runs
    sampling_std: float  # root mean square of the standard errors within a run
    training_std: float  # what the training seed adds; 0 where the runs spread no more than sampling explains


@dataclass(frozen=True)
class AcrossRuns:
    """One set of weights over R runs; raw has a distance alone.

    `shared` is the correlation of what the seed adds to these weights and to raw; None where one has no training variance.
    """

    distance: Spread  # bias-corrected
    difference: Spread | None = None  # paired, from raw
    p_value: float | None = None  # of that difference, two-sided, Holm-adjusted over the averages
    holds: bool | None = None  # p_value <= 0.05
    shared: float | None = None


def spread(values: Sequence[float], errors: Sequence[float]) -> Spread:
    """Splits the variance of `values`, one per run, whose standard errors within a run are `errors`. Needs two runs."""
    total, sampling = float(np.var(values, ddof=1)), float(np.mean(np.square(errors)))
    training = max(0.0, total - sampling)
    return Spread(float(np.mean(values)), (total / len(values)) ** 0.5, sampling**0.5, training**0.5)


def across_runs(runs: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, AcrossRuns]:
    """What R runs say together, by weights, of those that every run scored: at least two runs, each with raw.

    `runs` has of each the row of results.json by weights (`frechet_distance_unbiased`, `stderr`, and but for raw `delta_vs_raw`,
    `delta_stderr`).
    """
    if len(runs) < 2 or any("raw" not in run for run in runs):
        raise ValueError("runs: needs at least two, each with raw scored")
    common = [name for name in runs[0] if all(name in run for run in runs)]
    distances = {name: _spread(runs, name, "frechet_distance_unbiased", "stderr") for name in common}
    averages = [name for name in common if name != "raw" and all("delta_vs_raw" in run[name] for run in runs)]
    differences = {name: _spread(runs, name, "delta_vs_raw", "delta_stderr") for name in averages}
    p_values = holm({name: _p_value(differences[name], len(runs)) for name in averages})
    found = {name: AcrossRuns(distance) for name, distance in distances.items()}
    for name in averages:
        shared = _shared(distances[name], distances["raw"], differences[name])
        found[name] = AcrossRuns(distances[name], differences[name], p_values[name], p_values[name] <= ALPHA, shared)
    return found


def _spread(runs: Sequence[Mapping[str, Mapping[str, float]]], name: str, value: str, error: str) -> Spread:
    return spread([run[name][value] for run in runs], [run[name][error] for run in runs])


def _p_value(difference: Spread, count: int) -> float:
    if difference.stderr == 0.0:
        return 1.0 if difference.mean == 0.0 else 0.0
    return float(2 * stats.t.sf(abs(difference.mean) / difference.stderr, count - 1))


def _shared(average: Spread, raw: Spread, difference: Spread) -> float | None:
    product = average.training_std * raw.training_std
    if product == 0.0:
        return None
    covariance = (average.training_std**2 + raw.training_std**2 - difference.training_std**2) / 2
    return float(np.clip(covariance / product, -1.0, 1.0))
