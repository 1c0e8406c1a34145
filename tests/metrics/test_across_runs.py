"""Runs of several training seeds: hand-computed tables, and simulations whose truth is known."""

import math

import numpy as np
import pytest
from scipy import stats

from ddpm_ema.metrics.across_runs import across_runs, spread


def row(distance: float, error: float, delta: float | None = None, delta_error: float = 0.1) -> dict[str, float]:
    found = {"frechet_distance_unbiased": distance, "stderr": error}
    return found if delta is None else {**found, "delta_vs_raw": delta, "delta_stderr": delta_error}


def test_the_variance_of_runs_is_split_as_a_hand_computed_table_says() -> None:
    found = spread([1.0, 3.0, 5.0], [1.0, 1.0, 1.0])  # variance 4, of which sampling explains 1
    assert found.mean == 3.0
    assert found.stderr == pytest.approx(math.sqrt(4 / 3))
    assert (found.sampling_std, found.training_std) == (1.0, pytest.approx(math.sqrt(3)))


def test_runs_that_spread_no_more_than_sampling_have_no_training_variance() -> None:
    assert spread([1.0, 1.1], [0.5, 0.5]).training_std == 0.0


def test_the_verdict_is_students_t_over_runs_whatever_the_errors_within_a_run() -> None:
    deltas = [-1.0, -1.2, -0.9]
    runs = [{"raw": row(5.0 + i, 0.1), "ema": row(4.0 + i, 0.1, deltas[i])} for i in range(3)]
    found = across_runs(runs)["ema"]
    assert found.p_value == pytest.approx(stats.ttest_1samp(deltas, 0.0).pvalue)
    assert found.holds
    assert across_runs([{name: {**r, "delta_stderr": 9.0} for name, r in run.items()} for run in runs])["ema"].holds


def test_weights_that_a_run_lacks_are_left_out_and_raw_must_be_there() -> None:
    full, short = {"raw": row(5, 0.1), "ema": row(4, 0.1, -1)}, {"raw": row(5, 0.1)}
    assert list(across_runs([full, short])) == ["raw"]
    with pytest.raises(ValueError, match="at least two"):
        across_runs([full])
    with pytest.raises(ValueError, match="raw"):
        across_runs([full, {"ema": row(4, 0.1, -1)}])


def simulated(draws: int, gap: float, shared: float, runs: int = 4) -> list[list[dict[str, dict[str, float]]]]:
    """Raw and two averages; the seed adds N(0, 1) to each, correlated `shared`; sampling adds N(0, 0.3²), independent."""
    random = np.random.default_rng(0)
    common, own = random.normal(size=(draws, runs, 1)), random.normal(size=(draws, runs, 3))
    measured = math.sqrt(shared) * common + math.sqrt(1 - shared) * own + random.normal(size=(draws, runs, 3)) * 0.3
    measured += np.array([0.0, gap, gap])
    error, paired = 0.3, 0.3 * math.sqrt(2)
    return [
        [
            {
                "raw": row(raw, error),
                "a": row(a, error, a - raw, paired),
                "b": row(b, error, b - raw, paired),
            }
            for raw, a, b in draw
        ]
        for draw in measured
    ]


def test_equal_averages_are_called_different_in_at_most_five_per_cent_of_tables() -> None:
    tables = [across_runs(runs) for runs in simulated(1500, gap=0.0, shared=0.5)]
    false = np.mean([table["a"].holds or table["b"].holds for table in tables])
    assert 0.02 < false < 0.065


def test_what_the_seed_adds_to_raw_and_average_alike_cancels_in_their_difference() -> None:
    shared = [across_runs(runs)["a"] for runs in simulated(400, gap=-1.0, shared=0.9, runs=12)]
    apart = [across_runs(runs)["a"] for runs in simulated(400, gap=-1.0, shared=0.0, runs=12)]
    assert np.median([found.shared for found in shared if found.shared is not None]) == pytest.approx(0.9, abs=0.05)
    assert np.median([found.shared for found in apart if found.shared is not None]) == pytest.approx(0.0, abs=0.15)
    assert np.mean([found.holds for found in shared]) > 0.99
    assert np.mean([found.holds for found in apart]) < 0.85
