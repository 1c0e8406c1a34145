"""Runs of several training seeds: hand-computed tables, and simulations whose truth is known."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
from scipy import stats

from ddpm_ema.metrics import Estimate, Side
from ddpm_ema.metrics.across_runs import across_runs, spread

GROUPS = 20


def estimate(pseudo_values: object, reference: object = None) -> Estimate:
    sides = [np.asarray(side, dtype=float) for side in (pseudo_values, reference) if side is not None]
    found = tuple(Side(tuple(side.tolist()), (50,) * len(side)) for side in sides)
    return Estimate(0.0, found)


def test_the_variance_of_runs_is_split_as_a_hand_computed_table_says() -> None:
    # Means 1, 3, 5: S² = 4. Groups (-1, 1), (0, 0), (1, -1) around them: variances of the mean 1, 0, 1; covariances 0, -1, 0.
    found = spread([estimate([0, 2]), estimate([3, 3]), estimate([6, 4])])
    assert found.mean == 3.0
    assert found.stderr == pytest.approx(math.sqrt(4 / 3))
    assert (found.freedom, found.sampling_std) == (2.0, pytest.approx(math.sqrt(2 / 3)))
    assert found.training_std == pytest.approx(math.sqrt(4 - 2 / 3))


def test_what_all_runs_share_of_sampling_is_in_the_error_of_the_mean_and_no_part_of_the_seeds() -> None:
    # The groups of all runs deviate by (-1, 1): variance of the mean 1, covariance 1. Means 1, 3, 5 spread by the seed alone.
    found = spread([estimate([0, 2]), estimate([2, 4]), estimate([4, 6])])
    assert found.stderr == pytest.approx(math.sqrt(4 / 3 + 1))
    assert found.training_std == pytest.approx(2.0)
    assert found.freedom == 2.0  # never fewer than the runs have
    many = spread([estimate([level - 1, level + 1] * 8) for level in (0, 2, 4)])
    alike = 1 / 15  # variance of the mean, and covariance of two runs
    assert many.freedom == pytest.approx((4 / 3 + alike) ** 2 / ((4 / 3) ** 2 / 2 + (1.5 * alike) ** 2 / 15))


def test_the_images_of_the_reference_are_a_side_of_their_own() -> None:
    fixed = spread([estimate([0, 2]), estimate([2, 4]), estimate([4, 6])])
    sampled = spread([estimate([0, 2], [-3, 3]), estimate([2, 4], [-3, 3]), estimate([4, 6], [-3, 3])])
    assert sampled.stderr == pytest.approx(math.sqrt(fixed.stderr**2 + 9))
    assert sampled.training_std == pytest.approx(fixed.training_std)


def test_runs_that_spread_no_more_than_sampling_have_no_training_variance() -> None:
    assert spread([estimate([0.5, 1.5]), estimate([1.6, 0.6])]).training_std == 0.0


def test_groups_of_other_images_cannot_be_read_together() -> None:
    with pytest.raises(ValueError, match="groups"):
        spread([estimate([0, 2]), estimate([0, 2, 1])])


def test_where_groups_share_nothing_the_verdict_is_students_t_over_runs() -> None:
    deltas = [-1.0, -1.2, -0.9]
    runs = [{"raw": estimate([5 + i] * 4), "ema": estimate([5 + i + deltas[i]] * 4)} for i in range(3)]
    found = across_runs(runs)["ema"]
    assert found.p_value == pytest.approx(stats.ttest_1samp(deltas, 0.0).pvalue)
    assert found.holds


def test_weights_that_a_run_lacks_are_left_out_and_raw_must_be_there() -> None:
    full, short = {"raw": estimate([5, 6]), "ema": estimate([4, 5])}, {"raw": estimate([5, 6])}
    assert list(across_runs([full, short])) == ["raw"]
    with pytest.raises(ValueError, match="at least two"):
        across_runs([full])
    with pytest.raises(ValueError, match="raw"):
        across_runs([full, {"ema": estimate([4, 5])}])


def simulated(
    draws: int, gap: float, shared: float, runs: int = 4, seed: float = 1.0, noise: float = 0.0, reference: float = 0.0
) -> Iterator[list[dict[str, Estimate]]]:
    """Raw and two averages; the seed adds N(0, seed²) to each, correlated `shared` between weights.

    Sampling adds N(0, 0.3²) to each, correlated `noise` between runs; the images of the reference add N(0, reference²), the
    same in all runs.
    """
    random = np.random.default_rng(0)
    for _ in range(draws):
        common, own = random.normal(size=(runs, 1)), random.normal(size=(runs, 3))
        level = seed * (math.sqrt(shared) * common + math.sqrt(1 - shared) * own) + np.array([0.0, gap, gap])
        alike, apart = random.normal(size=(1, 3, GROUPS)), random.normal(size=(runs, 3, GROUPS))
        errors = 0.3 * math.sqrt(GROUPS) * (math.sqrt(noise) * alike + math.sqrt(1 - noise) * apart)
        images = reference * math.sqrt(GROUPS) * random.normal(size=(3, GROUPS))
        made = level[..., None] + errors
        yield [{name: estimate(run[k], images[k]) for k, name in enumerate(("raw", "a", "b"))} for run in made]


@pytest.mark.parametrize("runs", [2, 4])
@pytest.mark.parametrize(
    ("seed", "noise", "reference"), [(1.0, 0.0, 0.0), (0.1, 0.8, 0.0), (0.0, 1.0, 0.0), (0.3, 0.4, 0.3)]
)
def test_equal_averages_are_called_different_in_at_most_five_per_cent_of_tables(
    runs: int, seed: float, noise: float, reference: float
) -> None:
    tables = [across_runs(made) for made in simulated(600, 0.0, 0.5, runs, seed, noise, reference)]
    assert (
        np.mean([table["a"].holds or table["b"].holds for table in tables]) < 0.075
    )  # 5% and two of its standard errors


def test_an_average_that_is_better_is_called_so() -> None:
    tables = [across_runs(made) for made in simulated(200, -2.0, 0.5, 4, 0.3, 0.8, 0.1)]
    assert np.mean([table["a"].holds for table in tables]) > 0.9


def test_what_the_seed_adds_to_raw_and_average_alike_cancels_in_their_difference() -> None:
    shared = [across_runs(runs)["a"] for runs in simulated(200, gap=-1.0, shared=0.9, runs=12)]
    apart = [across_runs(runs)["a"] for runs in simulated(200, gap=-1.0, shared=0.0, runs=12)]
    assert np.mean([found.holds for found in shared]) > 0.99
    assert np.mean([found.holds for found in apart]) < 0.85
