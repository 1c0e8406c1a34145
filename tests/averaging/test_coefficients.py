"""Which combination of stored averages is nearest to another: the fit, its predictions, its warnings, and refused input."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onehot import kept_weighting

from ddpm_ema.averaging import (
    RAW,
    AverageBank,
    BiasCorrected,
    ConstantDecay,
    HardCopy,
    PowerFunction,
    Profile,
    StochasticWeightAverage,
    Uniform,
    Warmup,
    coefficients,
    posthoc_coefficients,
)

P05, P10, UNIFORM = PowerFunction(0.05), PowerFunction(0.10), Uniform()
PAIR, WITH_UNIFORM, TRIPLE = (P05, P10), (P05, UNIFORM), (P05, P10, UNIFORM)
TARGETS = [
    PowerFunction(0.15),
    BiasCorrected(0.99),
    BiasCorrected(0.999),
    ConstantDecay(0.995),
    StochasticWeightAverage(150, 7),
]


def grid(steps: int, count: int, profiles: Sequence[Profile], initial: bool = False) -> tuple[list[int], list[Profile]]:
    """Every profile stored `count` times, evenly."""
    at = [steps * (i + 1) // count for i in range(count) for _ in profiles]
    return [0] * initial + at, [RAW] * initial + [*profiles] * count


def cumulative(profile: Profile, step: int, steps: int) -> np.ndarray:
    """P(0) .. P(steps - 1) of the average stored at `step`, from its weighting written out."""
    known = np.cumsum(np.concatenate([[profile.initial_weight(step)], profile.weighting(step)]))
    return np.concatenate([known, np.ones(max(0, steps - len(known)))])[:steps]


def errors_of(
    found: coefficients.Coefficients, stored: tuple[list[int], list[Profile]], steps: int, target: Profile
) -> np.ndarray:
    """E(t) for t = 0 .. steps - 1."""
    columns = [cumulative(profile, step, steps) for step, profile in zip(*stored, strict=True)]
    return np.stack(columns, axis=1) @ found.weights - cumulative(target, steps, steps)


@pytest.mark.parametrize("target", TARGETS, ids=repr)
@pytest.mark.parametrize("stored", [PAIR, TRIPLE, (RAW, UNIFORM), (Warmup(0.99), HardCopy(60), UNIFORM)], ids=str)
@pytest.mark.parametrize("rate", [None, lambda t: min(1.0, (t + 1) / 60) * (1 - t / 700)])
def test_the_fit_is_the_least_squares_of_cumulative_weightings_by_brute_force(
    target: Profile, stored: tuple[Profile, ...], rate: Callable[[float], float] | None
) -> None:
    steps, pairs = 600, grid(600, 5, stored, initial=True)
    variance = np.ones(steps) if rate is None else np.array([rate(t) ** 2 for t in range(steps)])
    weight = np.sqrt(variance / variance.sum())
    columns = np.stack([cumulative(p, s, steps) for s, p in zip(*pairs, strict=True)], axis=1)
    # The sum is held by a heavy row; the ridge of fp32 rounding is below what this can tell.
    matrix = np.vstack([weight[:, None] * columns, np.full(columns.shape[1], 1e4)])
    goal = np.append(weight * cumulative(target, steps, steps), 1e4)
    expected = np.linalg.norm(matrix @ np.linalg.lstsq(matrix, goal, rcond=None)[0] - goal)

    found = posthoc_coefficients(*pairs, steps, target, step_variance=rate and (lambda t: rate(t) ** 2))

    error = np.linalg.norm(weight * errors_of(found, pairs, steps, target))
    assert found.weights.sum() == pytest.approx(1.0, abs=1e-9)
    assert error == pytest.approx(expected, rel=1e-3, abs=1e-6)
    unit = np.linalg.norm(weight * cumulative(target, steps, steps))
    assert found.predicted_relative_error == pytest.approx(error / unit, rel=1e-3, abs=1e-6)


# Percent, from the calculations that this fit was decided by: constant variance, evenly stored.
@pytest.mark.parametrize(
    ("steps", "count", "stored", "target", "percent"),
    [
        (1500, 10, PAIR, PowerFunction(0.03), 3.20),
        (1500, 10, PAIR, PowerFunction(0.25), 0.56),
        (1500, 10, PAIR, BiasCorrected(0.999), 1.19),
        (1500, 10, PAIR, UNIFORM, 2.09),
        (1500, 10, (RAW,), BiasCorrected(0.99), 39.3),
        (1500, 10, (RAW,), PowerFunction(0.20), 9.7),
        (3000, 10, WITH_UNIFORM, BiasCorrected(0.999), 0.095),
        (100_000, 10, WITH_UNIFORM, BiasCorrected(0.999), 58),
        (100_000, 20, WITH_UNIFORM, BiasCorrected(0.9999), 0.05),
        (800_000, 10, WITH_UNIFORM, BiasCorrected(0.9999), 41),
        (800_000, 50, WITH_UNIFORM, BiasCorrected(0.999), 122),
        (800_000, 100, WITH_UNIFORM, BiasCorrected(0.9999), 0.22),
        (800_000, 10, (RAW,), BiasCorrected(0.9999), 87),
    ],
)
def test_predicted_errors_are_those_of_an_independent_calculation(steps, count, stored, target, percent) -> None:
    found = posthoc_coefficients(*grid(steps, count, stored), steps, target, magnitude=0.0)
    assert 100 * found.predicted_relative_error == pytest.approx(percent, rel=0.05)


def random_walk(steps: int, size: int, rate: Callable[[int], float], seed: int = 0) -> np.ndarray:
    """theta_0 .. theta_steps of independent parameters, float64 [steps + 1, size]."""
    moves = np.random.default_rng(seed).standard_normal((steps, size)) * np.array([[rate(t)] for t in range(steps)])
    return np.concatenate([np.full((1, size), 5.0), 5.0 + np.cumsum(moves, axis=0)])


def kept(profile: Profile, step: int, steps: int) -> np.ndarray:
    """The weighting over theta_0 .. theta_steps that a bank really gives the average stored at `step`."""
    return np.concatenate([kept_weighting(profile, step), np.zeros(steps - step)])


@pytest.mark.parametrize(
    "rate", [lambda t: 1.0, lambda t: min(1.0, (t + 1) / 100) * (1 - t / 320)], ids=["constant", "decaying"]
)
@pytest.mark.parametrize("stored", [PAIR, WITH_UNIFORM, (RAW,)], ids=str)
def test_random_walks_err_as_predicted_and_by_nothing_but_the_sum_over_their_steps(stored, rate) -> None:
    steps, target = 300, BiasCorrected(0.98)
    pairs = grid(steps, 6, stored, initial=True)
    theta = random_walk(steps, 3000, rate)
    found = posthoc_coefficients(*pairs, steps, target, step_variance=lambda t: rate(t) ** 2)
    made = sum(c * kept(p, s, steps) for c, s, p in zip(found.weights, *pairs, strict=True)) @ theta
    exact = kept(target, steps, steps) @ theta

    by_parts = -errors_of(found, pairs, steps, target) @ np.diff(theta, axis=0)
    np.testing.assert_allclose(made - exact, by_parts, atol=2e-4)
    actual = np.linalg.norm(made - exact) / np.linalg.norm(exact - theta[-1])
    assert actual == pytest.approx(found.predicted_relative_error, rel=0.1)


@pytest.mark.parametrize("steps", [1000, 200_000])
def test_with_uniform_stored_a_window_that_starts_at_a_snapshot_is_exact(steps: int) -> None:
    """The mean of the last fifth is 5 U(T) - 4 U(0.8 T)."""
    found = posthoc_coefficients(*grid(steps, 5, WITH_UNIFORM), steps, StochasticWeightAverage(steps * 4 // 5 + 1))
    np.testing.assert_allclose(found.weights, [0, 0, 0, 0, 0, 0, 0, -4, 0, 5], atol=2e-3)
    assert found.predicted_relative_error < 1e-4
    between = posthoc_coefficients(*grid(steps, 5, WITH_UNIFORM), steps, StochasticWeightAverage(steps * 17 // 20))
    assert between.predicted_relative_error > 0.01


@pytest.mark.parametrize(
    ("target", "tolerance"), [(BiasCorrected(0.9), 1e-4), (BiasCorrected(0.99), 1e-5), (P10, 1e-5)]
)
def test_sums_over_half_a_million_steps_are_those_of_every_step(monkeypatch, target, tolerance) -> None:
    pairs = grid(500_000, 10, WITH_UNIFORM, initial=True)

    def found() -> coefficients.Coefficients:
        return posthoc_coefficients(*pairs, 500_000, target, step_variance=lambda t: min(1.0, (t + 1) / 50_000) ** 2)

    quadrature = found()
    monkeypatch.setattr(coefficients, "EVERY_STEP", 1 << 20)
    exact = found()
    assert quadrature.predicted_relative_error == pytest.approx(exact.predicted_relative_error, rel=tolerance)
    assert quadrature.profile_error == pytest.approx(exact.profile_error, rel=tolerance)


def test_ten_thousand_million_steps_are_fitted_like_any() -> None:
    short, long = (posthoc_coefficients(*grid(n, 20, TRIPLE), n, 0.15, magnitude=0.0) for n in (60_000, 10**10))
    assert long.predicted_relative_error == pytest.approx(short.predicted_relative_error, rel=0.01)


@pytest.mark.parametrize("every", [20, [1, 1, 25] * 5], ids=["all", "one of three"])
@pytest.mark.parametrize("target", [BiasCorrected(0.95), UNIFORM], ids=repr)
def test_averages_updated_every_few_steps_are_fitted_as_the_staircases_that_they_are(target: Profile, every) -> None:
    steps = 300
    pairs = grid(steps, 5, TRIPLE)
    found = posthoc_coefficients(*pairs, steps, target, every=every)
    intervals = np.broadcast_to(every, len(pairs[0])).tolist()
    stored = [np.pad(kept_weighting(p, s, n), (0, steps - s)) for s, p, n in zip(*pairs, intervals, strict=True)]
    errors = np.cumsum(found.weights @ np.array(stored))[:-1] - cumulative(target, steps, steps)
    actual = np.linalg.norm(errors) / np.linalg.norm(cumulative(target, steps, steps))
    assert actual == pytest.approx(found.predicted_relative_error, rel=1e-3)
    assert posthoc_coefficients(*pairs, steps, target).predicted_relative_error < 0.2 * actual  # would be too hopeful


def test_white_noise_of_raw_checkpoints_is_counted_and_averaged_away() -> None:
    steps, noise, pairs = 300, 25.0, grid(300, 15, (RAW,))
    theta = random_walk(steps, 3000, lambda t: 1.0)
    theta += math.sqrt(noise) * np.random.default_rng(1).standard_normal(theta.shape)
    target = BiasCorrected(0.98)
    exact, stored = kept(target, steps, steps) @ theta, theta[pairs[0]]

    def ratio(white_noise: float) -> tuple[float, float]:
        found = posthoc_coefficients(*pairs, steps, target, white_noise=white_noise)
        actual = np.linalg.norm(found.weights @ stored - exact) / np.linalg.norm(exact - theta[-1])
        return actual, actual / found.predicted_relative_error

    (told, of_told), (untold, of_untold) = ratio(noise), ratio(0.0)
    assert of_told == pytest.approx(1.0, abs=0.1)
    assert of_untold > 1.3
    assert told < untold


def test_variances_may_be_given_by_interval() -> None:
    pairs = grid(400, 4, PAIR)
    by_interval = posthoc_coefficients(*pairs, 400, 0.2, step_variance=([100, 300, 400], [9.0, 1.0, 4.0]))
    by_step = posthoc_coefficients(
        *pairs, 400, 0.2, step_variance=lambda t: 9.0 if t < 100 else 1.0 if t < 300 else 4.0
    )
    np.testing.assert_allclose(by_interval.weights, by_step.weights, rtol=1e-9)


@given(target=st.sampled_from([0.07, 0.12, 0.2]), index=st.integers(0, 9))
@settings(max_examples=20, deadline=None)
def test_an_average_that_was_stored_is_given_back_by_itself(target: float, index: int) -> None:
    steps, profiles = grid(1000, 5, PAIR)
    steps[index], profiles[index] = 1000, PowerFunction(target)
    ours = posthoc_coefficients(steps, profiles, 1000, target)
    np.testing.assert_allclose(ours.weights, np.eye(10)[index], atol=1e-5)
    assert ours.predicted_relative_error < 1e-5


def test_one_average_can_only_be_itself() -> None:
    ours = posthoc_coefficients([100], [0.1], 100, 0.05)
    assert ours.weights.tolist() == [1.0]
    assert ours.profile_error > 0.3


def test_initial_weights_stored_once_make_a_constant_decay_as_good_as_its_debiased_form() -> None:
    plain, debiased = ConstantDecay(0.9999), BiasCorrected(0.9999)
    without = posthoc_coefficients(*grid(3000, 10, WITH_UNIFORM), 3000, plain)
    assert without.initial_weight_error == pytest.approx(0.9999**3000, rel=0.2)
    assert without.predicted_relative_error == pytest.approx(0.13, abs=0.005)
    (sentence,) = without.warnings()
    assert "more or less of the initial parameters than the stored averages can" in sentence
    whole, other = (
        posthoc_coefficients(*grid(3000, 10, WITH_UNIFORM, initial=True), 3000, p) for p in (plain, debiased)
    )
    assert whole.predicted_relative_error < 2 * other.predicted_relative_error < 1e-3
    assert whole.initial_weight_error < 1e-4


def test_raw_has_no_relative_error_and_says_when_it_was_not_stored() -> None:
    stored = posthoc_coefficients(*grid(500, 5, (RAW, UNIFORM)), 500, RAW)
    assert stored.predicted_relative_error is None
    assert stored.weights[-2] == pytest.approx(1.0)
    assert stored.warnings() == []
    (sentence,) = posthoc_coefficients(*grid(500, 5, PAIR), 500, RAW).warnings()
    assert sentence.startswith("Raw weights cannot be reconstructed")


def test_a_target_that_the_stored_averages_cannot_give_says_so_from_five_per_cent() -> None:
    (sentence,) = posthoc_coefficients(*grid(100_000, 10, WITH_UNIFORM), 100_000, BiasCorrected(0.999)).warnings()
    assert sentence.startswith("Predicted error 58.2% of the average's distance from the raw weights.")
    assert posthoc_coefficients(*grid(3000, 10, WITH_UNIFORM), 3000, BiasCorrected(0.99)).warnings() == []


def test_rounding_that_is_amplified_says_so_and_a_fit_that_knows_it_amplifies_less() -> None:
    pairs = grid(10_000, 100, PAIR)
    fp32, bf16 = (posthoc_coefficients(*pairs, 10_000, BiasCorrected(0.99), roundoff=u) for u in (2.0**-24, 2.0**-8))
    assert fp32.warnings() == []
    assert bf16.amplification < 0.2 * fp32.amplification
    assert bf16.rounding == pytest.approx(bf16.amplification * 2.0**-8)
    assert any("Rounding in the stored averages is amplified" in sentence for sentence in bf16.warnings())


def test_updates_round_an_average_as_the_prediction_has_it() -> None:
    """Of an average that was stored nothing is left to predict but the rounding of its updates, each kept as it is itself."""
    rules = {"uniform": UNIFORM, "p10": P10, "debiased": BiasCorrected(0.99)}
    steps, size = 2000, 3000
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(size, generator=generator)
    bank, exact = AverageBank([("w", weight)], rules), {name: torch.zeros(size, dtype=torch.float64) for name in rules}
    for step in range(1, steps + 1):
        weight += torch.randn(size, generator=generator) / 40
        bank.update(step)
        for name, rule in rules.items():
            exact[name].lerp_(weight.double(), 1 - rule.decay(step))
    for name, rule in rules.items():
        distance = (exact[name] - weight).norm()
        actual = (bank.weights(name)["w"] - exact[name]).norm() / distance
        magnitude = exact[name].norm().item() / (math.sqrt(steps * size) / 40)
        found = posthoc_coefficients([steps], [rule], steps, rule, magnitude=magnitude)
        assert actual.item() == pytest.approx(found.predicted_relative_error, rel=0.15)


def test_more_averages_than_steps_are_solved() -> None:
    ours = posthoc_coefficients(*grid(20, 20, TRIPLE), 20, 0.08)
    assert ours.weights.sum() == pytest.approx(1.0)
    assert ours.predicted_relative_error < 1e-5


@pytest.mark.parametrize(
    ("steps", "profiles", "step_out", "target", "more", "message"),
    [
        ([99.5], [0.05], 100, 0.1, {}, "steps_in: expected a whole number .* got 99.5"),
        ([100], [0.05], 100, 0.1, {"every": 0}, "every: expected a whole number .* got 0"),
        ([100], [0.05], 100, 0.1, {"white_noise": -1.0}, "white_noise: expected a finite number of at least 0"),
        ([100], [0.05], 100, 0.1, {"magnitude": float("nan")}, "magnitude: expected a finite number of at least 0"),
        ([], [], 100, 0.1, {}, "expected equally many, at least one; got 0 and 0"),
        ([100], [0.05, 0.1], 100, 0.1, {}, "got 1 and 2"),
        ([100, 200], [0.05, 0.1], 150, 0.1, {}, "0 <= step <= step_out = 150, got 200"),
        ([0], [0.05], 0, 0.1, {}, "step_out = 0"),
        ([100, 100], [0.05, 0.05], 150, 0.1, {}, r"PowerFunction\(std=0\.05\) at step 100 is given twice"),
        ([100], [0.5], 150, 0.1, {}, r"std: expected a number with 0 < std < 0\.288675"),
        ([100], [0.05], 150, 0.29, {}, r"std: .* got 0\.29"),
        ([100], [0.05], 150, 0.1, {"step_variance": lambda t: -t}, "step_variance: expected finite variances"),
        ([100], [0.05], 150, 0.1, {"step_variance": lambda t: 0.0}, "step_variance: expected some variance"),
        ([100], [0.05], 150, 0.1, {"step_variance": ([9, 3], [1, 1])}, "step_variance: expected .* ends that grow"),
        ([100], [0.05], 150, 0.1, {"step_variance": ([], [])}, "step_variance: expected .* at least one"),
    ],
)
def test_bad_input_is_refused(steps, profiles, step_out, target, more, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        posthoc_coefficients(steps, profiles, step_out, target, **more)
