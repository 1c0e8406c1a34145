"""Post-hoc EMA: the combination of stored averages with the least expected distance from another average.

An average is A = sum_t w(t) theta_t over the initial parameters theta_0 and those after each step, with weights that sum to 1. With
cumulative weightings P(t) = w(0) + ... + w(t) and coefficients c that sum to 1, summation by parts gives

    sum_i c_i A_i - A = -sum_{t < T} E(t) (theta_{t+1} - theta_t),        E(t) = sum_i c_i P_i(t) - P(t).

If steps are uncorrelated and step t + 1 has variance v(t), the expected squared error is sum_t v(t) E(t)^2, which is minimised
here. Karras et al. 2024 (arXiv 2312.02696, section 3.2) introduced combining stored averages; they minimise the L2 distance of the
weightings (appendix C.3), which is the expected error if the parameters are white noise.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from ddpm_ema.averaging.checks import check_count, check_real
from ddpm_ema.averaging.profiles import FloatArray, HardCopy, PowerFunction, Profile

StepVariance: TypeAlias = Callable[[float], float] | tuple[Sequence[int], Sequence[float]]
"""Variance of step t + 1 as a function of t, or (ends, values): values[i] for the steps after ends[i - 1] up to ends[i]."""

FIT_VERSION = 1
"""Goes up whenever the same input gives other coefficients."""
RAW = HardCopy(1)
"""The profile of parameters that are not averaged."""
ROUNDOFF = 2.0**-24
"""Largest relative rounding error of fp32."""
MAX_PREDICTED_ERROR = 0.05
"""Predicted relative error from which a reconstruction warns."""
MAX_ROUNDING = 0.01
"""Rounding error, as a share of a weight, from which it does."""
MAX_INITIAL_WEIGHT_ERROR = 0.01
"""Wrong weight of the initial parameters from which the warning names them."""

EVERY_STEP = 1 << 16
"""Up to this many steps, sums over steps are exact; beyond, they are Gauss-Legendre quadratures between the stored steps."""
_ROUNDING = np.sqrt(1 / (8 * np.log(2)))  # root mean square of relative rounding errors over the largest one
_LAST_STEPS, _GROWTH = 16, 3  # of an interval's steps the last are taken one by one, then panels that widen backwards
_NODES, _NODE_WEIGHTS = np.polynomial.legendre.leggauss(8)


@dataclass(frozen=True)
class Coefficients:
    """How to combine stored averages, and how far to trust the result.

    Attributes:
        weights: float64 [num_in], summing to 1.
        predicted_relative_error: expected error of the combination (root mean square under the model of `posthoc_coefficients`,
            rounding included) as a share of the expected distance of the target from the raw weights. None where it is raw.
        profile_error: relative L2 distance between the weightings of target and result, over steps 1..step_out.
        initial_weight_error: absolute difference in the weight of the *initial* parameters.
        amplification: L1 norm of the weights: largest factor on rounding errors in the stored averages.
        rounding: sum of |weight| x roundoff: largest rounding error of the result, as a share of a weight.
    """

    weights: FloatArray
    predicted_relative_error: float | None
    profile_error: float
    initial_weight_error: float
    amplification: float
    rounding: float

    def warnings(self) -> list[str]:
        """Reasons not to trust the result, in plain sentences."""
        warnings = []
        predicted = self.predicted_relative_error
        if predicted is None and self.profile_error > MAX_PREDICTED_ERROR:
            warnings.append("Raw weights cannot be reconstructed from averages. Store them as they are.")
        if predicted is not None and predicted >= MAX_PREDICTED_ERROR:
            initial = self.initial_weight_error
            held = (
                f" The target holds {initial:.1%} more or less of the initial parameters than the stored averages can: "
                "store those once (step 0), or ask for the debiased profile (bias_corrected)."
            )
            warnings.append(
                f"Predicted error {predicted:.1%} of the average's distance from the raw weights. Store more snapshots, or keep "
                f"this average while training.{held if initial >= MAX_INITIAL_WEIGHT_ERROR else ''}"
            )
        if self.rounding >= MAX_ROUNDING:
            warnings.append(
                f"Rounding in the stored averages is amplified {self.amplification:.3g} times, "
                f"to as much as {self.rounding:.1%} of a weight. Store the snapshots in fp32."
            )
        return warnings


@dataclass(frozen=True)
class Stored:
    """A stored average without its tensors: its step, profile, steps between updates, and relative roundoff."""

    step: int
    profile: Profile
    every: int = 1
    roundoff: float = ROUNDOFF

    @property
    def updated(self) -> int:
        """The step of its last update."""
        return self.step // self.every * self.every

    def cumulative(self, step: int, t: FloatArray) -> FloatArray:
        """`Profile.cumulative`; for updates every N steps a staircase, since all weight is on multiples of N."""
        return self.profile.cumulative(step, np.floor(t / self.every) * self.every if self.every > 1 else t)


def posthoc_coefficients(
    steps_in: Sequence[int],
    profiles_in: Sequence[float | Profile],
    step_out: int,
    target: float | Profile,
    *,
    step_variance: StepVariance | None = None,
    white_noise: float = 0.0,
    every: int | Sequence[int] = 1,
    roundoff: float | Sequence[float] = ROUNDOFF,
    magnitude: float = 1.0,
) -> Coefficients:
    """The combination of stored averages with the least expected distance from the target.

    The model: steps of training are uncorrelated, with the given variance. Every update of an fp32 average rounds it, and so does
    storing it; later files of one average share its updates' rounding errors.

    Args:
        steps_in: steps at which the averages were stored, [num_in], none after `step_out`; at step 0 they are the initial parameters.
        profiles_in: their profiles, or power-function widths, [num_in]; `RAW` for parameters that are not averaged.
        step_out: the step to have the target average at.
        target: a profile, or a power-function width.
        step_variance: variance of each step in any unit, constant by default; proportional to learning_rate(t)^2.
        white_noise: variance of white noise on raw parameters, in steps. It adds
            white_noise * sum_t v(t) (sum_i c_i w_i(t) - w(t))^2 to the expected squared error.
        every: steps between updates of the stored averages, [num_in] or one for all.
        roundoff: largest relative rounding error of the stored averages (2^-24 for fp32, 2^-8 for bf16), [num_in] or one for all.
        magnitude: |theta| / sqrt(sum v), the size of the weights relative to their random walk; rounding is relative to it.

    Raises:
        ValueError: no averages, lengths that differ, a step out of range, one average given twice, a bad width, variance or number.
    """
    num_in = len(steps_in)
    if not num_in or num_in != len(profiles_in):
        raise ValueError(
            f"steps_in, profiles_in: expected equally many, at least one; got {num_in} and {len(profiles_in)}"
        )
    updates, roundoffs = (np.broadcast_to(value, num_in).tolist() for value in (every, roundoff))
    for name, value in (("magnitude", magnitude), ("white_noise", white_noise)):
        check_real(name, value, 0.0, float(np.finfo(np.float64).max), "a finite number of at least 0")
    stored = [
        Stored(check_count("steps_in", step, 0), as_profile(profile), check_count("every", n), float(u))
        for step, profile, n, u in zip(steps_in, profiles_in, updates, roundoffs, strict=True)
    ]
    if not (last := max(one.step for one in stored)) <= step_out or step_out < 1:
        raise ValueError(f"steps_in: expected 0 <= step <= step_out = {step_out}, got {last}")
    return solve(stored, [Stored(step_out, as_profile(target))], step_variance, white_noise, magnitude)[0]


def as_profile(profile: float | Profile) -> Profile:
    return profile if isinstance(profile, Profile) else PowerFunction(std=profile)


def solve(
    stored: Sequence[Stored],
    targets: Sequence[Stored],
    step_variance: StepVariance | None = None,
    white_noise: float = 0.0,
    magnitude: float = 1.0,
) -> list[Coefficients]:
    """`posthoc_coefficients` for several targets at one step, in one factorisation. Raises ValueError for one stored twice."""
    num_in, goals = len(stored), [*targets, Stored(targets[0].step, RAW)]
    if len(set(stored)) < num_in:
        one = next(one for i, one in enumerate(stored) if one in stored[:i])
        raise ValueError(f"steps_in, profiles_in: {one.profile!r} at step {one.step} is given twice")
    errors, weightings, noise, updates, initial, total = _equations(stored, goals, step_variance)
    rows = np.concatenate([errors, np.sqrt(white_noise) * noise]) / np.sqrt(total)  # in the unit sum v = 1
    storing = np.eye(num_in, num_in + len(goals)) * [[one.roundoff] for one in stored]
    rows = np.concatenate([rows, _ROUNDING * magnitude * np.concatenate([ROUNDOFF * updates, storing])])
    # The newest average's coefficient is what the others lack to 1.
    newest = max(range(num_in), key=lambda i: stored[i].step)
    others = [i for i in range(num_in) if i != newest]
    matrix, goal = rows[:, others] - rows[:, [newest]], rows[:, num_in:] - rows[:, [newest]]
    free = np.linalg.lstsq(matrix, goal, rcond=None)[0]
    weights = np.insert(free, newest, 1.0 - free.sum(axis=0), axis=0)
    left = np.linalg.norm(goal - matrix @ free, axis=0)
    apart = np.linalg.norm(rows[:, num_in:] - rows[:, [-1]], axis=0)  # of the target and raw
    profile_left = np.linalg.norm(weightings[:, :num_in] @ weights - weightings[:, num_in:], axis=0)
    profile_length = np.linalg.norm(weightings[:, num_in:], axis=0)
    return [
        Coefficients(
            weights=weights[:, k],
            predicted_relative_error=float(left[k] / apart[k]) if apart[k] > 1e-12 else None,
            profile_error=float(profile_left[k] / (profile_length[k] or 1.0)),
            initial_weight_error=abs(float(initial[:num_in] @ weights[:, k] - initial[num_in + k])),
            amplification=float(np.abs(weights[:, k]).sum()),
            rounding=float(np.abs(weights[:, k]) @ [one.roundoff for one in stored]),
        )
        for k in range(len(targets))
    ]


def expected_distance(a: Stored, b: Stored, step_variance: StepVariance | None = None) -> float:
    """Expected distance of two averages, the second no earlier than the first, as a share of sqrt(sum v)."""
    errors, *_, total = _equations([a], [b], step_variance)
    return float(np.linalg.norm(errors[:, 0] - errors[:, 1]) / np.sqrt(total))


def _equations(
    stored: Sequence[Stored], goals: Sequence[Stored], step_variance: StepVariance | None
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray, FloatArray, float]:
    """Matrices with columns [stored | goals] whose few rows have the same inner products as one row per step would have.

    In an interval first <= t < last between two stored steps, P(t) of an average stored later is P_last(t) of its rule times the
    share of it that survives, since profiles compose; of one stored earlier it is 1. So an interval has one independent column per
    rule and goal, and a QR factorisation compresses its rows to as many.

    Returns:
        sqrt(v(t)) P(t), float64 [num_rows, num_in + num_goals]; the weightings w(t + 1), same shape; sqrt(v(t)) w(t + 1), same shape;
        the surviving share of the rounding of update t + 1, per rule, same columns; P(0) [num_in + num_goals]; the sum of v.
    """
    step_out, num_goals = goals[0].step, len(goals)
    edges = sorted({0, step_out, *(one.updated for one in stored)})
    rules = list(dict.fromkeys((one.profile, one.every) for one in stored))
    rule_of = [rules.index((one.profile, one.every)) for one in stored]
    survived = np.stack([_at(one, np.asarray(edges, dtype=np.float64)) for one in (*stored, *goals)])  # [.., num_edges]
    errors, weightings, noise, updates, total = [], [], [], [], 0.0
    for place, (first, last) in enumerate(itertools.pairwise(edges)):
        t, counts = _nodes(first, last, step_out <= EVERY_STEP)
        variance = counts * _variances(step_variance, t)
        total += float(variance.sum())
        kept = [Stored(last, profile, every) for profile, every in rules]
        now, then = (
            np.stack([*(_at(one, x) for one in (*kept, *goals)), np.ones_like(x)], axis=1) for x in (t, t + 1.0)
        )
        expand = np.zeros((now.shape[1], len(stored) + num_goals))
        for i, one in enumerate(stored):
            later = one.updated >= last
            expand[rule_of[i] if later else -1, i] = survived[i, place + 1] if later else 1.0
        expand[len(rules) : -1, len(stored) :] = np.eye(num_goals)
        errors.append(np.linalg.qr(np.sqrt(variance)[:, None] * now, mode="r") @ expand)
        weightings.append(np.linalg.qr(np.sqrt(counts)[:, None] * (then - now), mode="r") @ expand)
        noise.append(np.linalg.qr(np.sqrt(variance)[:, None] * (then - now), mode="r") @ expand)
        kept_roundings = counts @ np.square(then[:, : len(rules)]) / [every for _, every in rules]
        updates.append(np.sqrt(kept_roundings)[:, None] * expand[: len(rules)])
    if total == 0.0:
        raise ValueError("step_variance: expected some variance above 0")
    rows = [np.concatenate(part) for part in (errors, weightings, noise, updates)]
    return rows[0], rows[1], rows[2], rows[3], survived[:, 0], total


def _at(one: Stored, t: FloatArray) -> FloatArray:
    return one.cumulative(one.updated, t) if one.updated else np.ones_like(t)


def _nodes(first: int, last: int, every_step: bool) -> tuple[FloatArray, FloatArray]:
    """t and counts such that the sum of f(t) over first <= t < last is counts @ f(t).

    A sum over whole t is the integral from half a step before the first to half a step after the last, up to f'' / 24. The last
    steps are exact; the panels before them widen by a factor of three, so narrow averages change by a bounded factor over each.
    """
    tail = max(first, last - _LAST_STEPS)
    if every_step or tail == first:
        return np.arange(first, last, dtype=np.float64), np.ones(last - first)
    t, counts = [np.arange(tail, last, dtype=np.float64)], [np.ones(last - tail)]
    near, farthest = last - tail + 0.5, last - first + 0.5
    while near < farthest:
        far = min(_GROWTH * near, farthest)
        half = (far - near) / 2
        t.append(last - (near + far) / 2 + half * _NODES)
        counts.append(half * _NODE_WEIGHTS)
        near = far
    return np.concatenate(t), np.concatenate(counts)


def variance_between(step_variance: StepVariance | None, first: int, last: int) -> float:
    """The sum of v(t) over first <= t < last."""
    t, counts = _nodes(first, last, last - first <= EVERY_STEP)
    return float(counts @ _variances(step_variance, t))


def _variances(step_variance: StepVariance | None, t: FloatArray) -> FloatArray:
    if step_variance is None:
        return np.ones_like(t)
    if callable(step_variance):
        found = np.asarray([step_variance(x) for x in t.tolist()], dtype=np.float64)
    else:
        ends, values = (np.asarray(part, dtype=np.float64) for part in step_variance)
        if ends.shape != values.shape or ends.ndim != 1 or not ends.size or not np.all(np.diff(ends) > 0):
            raise ValueError("step_variance: expected (ends, values), equally many, at least one, with ends that grow")
        found = values[np.minimum(np.searchsorted(ends - 0.5, t, side="right"), len(values) - 1)]
    if not np.all((found >= 0.0) & (found < np.inf)):
        raise ValueError("step_variance: expected finite variances of at least 0")
    return found
