"""Post-hoc EMA on files: any averaging profile as a linear combination of stored averages, and a check of what was predicted.

The coefficients are those of `coefficients.py`. The tensors are read one file at a time, a bounded part of the model at a time.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm_ema.averaging.coefficients import (
    FIT_VERSION,
    RAW,
    Coefficients,
    FloatArray,
    StepVariance,
    Stored,
    as_profile,
    expected_distance,
    posthoc_coefficients,
    solve,
    variance_between,
)
from ddpm_ema.averaging.naming import check_tensors
from ddpm_ema.averaging.profiles import Profile
from ddpm_ema.averaging.snapshots import Snapshot

MAX_MISPREDICTION = 2.0
"""Actual error of a check over the predicted one from which a reconstruction warns, where it is"""
MIN_CHECKED_ERROR = 0.01
"""at least this share of the distance from raw."""


@dataclass(frozen=True)
class Check:
    """A stored average, rebuilt from the others and compared with itself.

    Attributes:
        name: its file's name.
        profile: its profile.
        predicted: predicted error, as a share of its distance from the raw weights.
        actual: the error, as a share of the same.
    """

    name: str
    profile: Profile
    predicted: float
    actual: float

    def warnings(self) -> list[str]:
        """A sentence where the prediction was far too good; none where it was not."""
        if self.actual < max(MAX_MISPREDICTION * self.predicted, MIN_CHECKED_ERROR):
            return []
        sentence = (
            f"Check: {self.name}, rebuilt from the other snapshots, is off by {self.actual:.1%} where {self.predicted:.1%} was "
            "predicted. Errors predicted for this run may be as much too low."
        )
        return [sentence]


@dataclass(frozen=True)
class Fit:
    """How an average is made from stored ones; no tensors yet.

    Attributes:
        step: the step it is the average at.
        target: the profile asked for.
        snapshots: what it is made from, in the order of `coefficients.weights`.
        coefficients: how it is made.
        step_variance: as given to `fit`.
        white_noise: as given to `fit`, or estimated.
        magnitude: estimated, as of `posthoc_coefficients`.
    """

    step: int
    target: Profile
    snapshots: tuple[Snapshot, ...]
    coefficients: Coefficients
    step_variance: StepVariance | None
    white_noise: float
    magnitude: float

    @property
    def identity(self) -> list[Any]:
        """What the coefficients follow from beside the files and the target: changes whenever they would."""
        steps = [snapshot.step for snapshot in self.snapshots]
        moved = [variance_between(self.step_variance, a, b) for a, b in itertools.pairwise([0, *dict.fromkeys(steps)])]
        return [FIT_VERSION, self.step, *(f"{variance:.9g}" for variance in moved)]

    def warnings(self, check: Check | None = None) -> list[str]:
        """Why it should not be trusted, in plain sentences; empty if it may be."""
        return [*self.coefficients.warnings(), *(check.warnings() if check else [])]

    def summary(self, check: Check | None = None) -> dict[str, Any]:
        """How far to trust it, as plain values."""
        coefficients = self.coefficients
        return {
            "num_snapshots": len(self.snapshots),
            "predicted_relative_error": coefficients.predicted_relative_error,
            "profile_error": coefficients.profile_error,
            "amplification": coefficients.amplification,
            "check": {"weights": check.name, "predicted": check.predicted, "actual": check.actual} if check else None,
        }

    def combined(self) -> dict[str, Tensor]:
        """Parameter name -> fp32 CPU tensor, in the order of the newest file. Raises as `reconstruct`."""
        shapes = self.snapshots[-1].shapes()
        combined = dict(combine(self.snapshots, self.coefficients.weights, shapes))
        return {name: combined[name] for name in shapes}

    def checked(self, kept: Iterable[Snapshot] = ()) -> Check | None:
        """Rebuild the stored average whose weighting is nearest to the target's from the other snapshots; reads every file once.

        Args:
            kept: averages and raw weights that were stored at `step`, but are not among the snapshots.

        Returns:
            None where raw or every average is missing at `step`, or there is nothing to rebuild one from.

        Raises: as `reconstruct`.
        """
        here = [snapshot for snapshot in (*self.snapshots, *kept) if snapshot.step == self.step]
        raw = next((snapshot for snapshot in here if snapshot.profile == RAW), None)
        candidate = min((snapshot for snapshot in here if snapshot.profile != RAW), key=self._apart, default=None)
        rest = [s for s in self.snapshots if candidate and (s.step, s.profile) != (self.step, candidate.profile)]
        if raw is None or candidate is None or not rest:
            return None
        found = solve([_stored(s) for s in rest], [_stored(candidate)], *self._model)[0]
        files = (*rest, candidate, raw)
        actual = _off_by(files, tuple(found.weights.tolist()), tuple(s.path.stat().st_mtime_ns for s in files))
        return Check(candidate.path.stem, candidate.profile, found.predicted_relative_error or 0.0, actual)

    @property
    def _model(self) -> tuple[StepVariance | None, float, float]:
        return self.step_variance, self.white_noise, self.magnitude

    def _apart(self, snapshot: Snapshot) -> float:
        """Expected distance of a stored average from the target, as a share of the target's distance from raw."""
        alone = solve([_stored(snapshot)], [Stored(self.step, self.target)], *self._model)[0]
        return alone.predicted_relative_error or 0.0


@functools.lru_cache(maxsize=64)
def _off_by(files: tuple[Snapshot, ...], weights: tuple[float, ...], modified: tuple[int, ...]) -> float:
    """How far the combination of all files but two is from the last but one, as a share of its distance from the last.

    Remembered, since the candidates of a sweep share their checks; `modified` are the files' times.
    """
    *rest, stored, other = files
    error = distance = 0.0
    for name, rebuilt in combine(rest, weights, stored.shapes()):
        (_, exact), (_, apart) = *stored.tensors([name]), *other.tensors([name])
        error += float((rebuilt.double() - exact).square().sum())
        distance += float((apart.double() - exact).square().sum())
    return float(np.sqrt(error / distance)) if distance else 0.0


@dataclass(frozen=True)
class Reconstruction:
    """An average made after the fact.

    Attributes:
        weights: parameter name -> fp32 CPU tensor, in the order of the files: pair them by name.
        fit: how it was made.
        check: what the prediction was worth for another average, that was stored; None where there was none.
    """

    weights: dict[str, Tensor]
    fit: Fit
    check: Check | None

    @property
    def coefficients(self) -> Coefficients:
        """How the snapshots were combined, and how far to trust the result."""
        return self.fit.coefficients

    @property
    def warnings(self) -> list[str]:
        """Why it should not be trusted, in plain sentences; empty if it may be."""
        return self.fit.warnings(self.check)


def fit(
    snapshots: Iterable[Snapshot],
    step_out: int,
    target: float | Profile,
    *,
    step_variance: StepVariance | None = None,
    white_noise: float | None = None,
) -> Fit:
    """`reconstruct` without the tensors: which snapshots, which coefficients, how good. Arguments and errors are the same."""
    snapshots = sorted(snapshots, key=lambda snapshot: snapshot.step)
    steps = sorted({snapshot.step for snapshot in snapshots if snapshot.step > 0})
    if step_out not in steps:
        raise ValueError(f"step {step_out} was not stored; {_nearest_steps(step_out, steps)}")
    used = tuple(snapshot for snapshot in snapshots if snapshot.step <= step_out)
    shapes = used[-1].shapes()
    for snapshot in used:
        _check_shapes(snapshot, shapes)
    if white_noise is None:
        white_noise = estimate_white_noise([s for s in used if s.profile == RAW and s.step > 0], step_variance)
    magnitude = _magnitude(used[0], used[-1], step_variance)
    coefficients = posthoc_coefficients(
        [snapshot.step for snapshot in used],
        [snapshot.profile for snapshot in used],
        step_out,
        target,
        step_variance=step_variance,
        white_noise=white_noise,
        every=[snapshot.every for snapshot in used],
        roundoff=[snapshot.roundoff() for snapshot in used],
        magnitude=magnitude,
    )
    return Fit(step_out, as_profile(target), used, coefficients, step_variance, white_noise, magnitude)


def reconstruct(
    snapshots: Iterable[Snapshot],
    step_out: int,
    target: float | Profile,
    *,
    step_variance: StepVariance | None = None,
    white_noise: float | None = None,
    check: bool = True,
    kept: Iterable[Snapshot] = (),
) -> Reconstruction:
    """The average with the target profile at `step_out`, from stored ones, never kept during training.

    Snapshots are read one file at a time, a bounded part of the tensors at a time; memory is at most that of two models
    (or of three and a half times the largest tensor beyond the result, if a single tensor is most of the model).

    Args:
        snapshots: stored averages, in any order, of any profiles, `RAW` included; those after `step_out` are left aside.
        step_out: a step at which a snapshot was stored.
        target: a power-function width, or any profile.
        step_variance: as of `posthoc_coefficients`: give learning_rate(t)^2 where the rate warms up or decays.
        white_noise: as of `posthoc_coefficients`; None estimates it where three raw snapshots or more are there.
        check: also rebuild an average that was stored at `step_out` from the others, where raw was stored there, too. Reads every
            file once more.
        kept: what else was stored at `step_out`, raw or averages: used for the check alone.

    Raises:
        ValueError: no snapshot was stored at `step_out` (the nearest steps are named), one is given twice, two hold different
            tensors (each is named), a file is not a snapshot, or a bad width.
        OSError: a file cannot be read.
    """
    found = fit(snapshots, step_out, target, step_variance=step_variance, white_noise=white_noise)
    return Reconstruction(found.combined(), found, found.checked(kept) if check else None)


def _magnitude(first: Snapshot, last: Snapshot, step_variance: StepVariance | None) -> float:
    """|theta| / sqrt(sum v), from how far apart two stored averages are."""
    size, moved = _lengths(first, last, (first.path.stat().st_mtime_ns, last.path.stat().st_mtime_ns))
    expected = expected_distance(_stored(first), _stored(last), step_variance)
    return size * expected / moved if moved > 0.0 else 1.0


@functools.lru_cache(maxsize=64)
def _lengths(first: Snapshot, last: Snapshot, modified: tuple[int, ...]) -> tuple[float, float]:
    """L2 norms of the last and of the difference. Remembered as `_off_by` is."""
    size = moved = 0.0
    for name in last.shapes():
        (_, before), (_, after) = *first.tensors([name]), *last.tensors([name])
        size += float(after.double().square().sum())
        moved += float((after.double() - before).square().sum())
    return math.sqrt(size), math.sqrt(moved)


def estimate_white_noise(raw: Sequence[Snapshot], step_variance: StepVariance | None = None) -> float:
    """Variance of the noise of raw weights about the wandering ones, in steps (white_noise * v(t)); reads every file once.

    Of a random walk plus white noise, |theta_i - theta_j|^2 is expected to be proportional to the sum of v between i and j,
    plus white_noise (v_i + v_j). Neighbours and neighbours but one give the two unknowns. 0 for fewer than three checkpoints.

    Args:
        raw: checkpoints of one run, by step.
        step_variance: as of `posthoc_coefficients`.
    """
    if len(raw) < 3:
        return 0.0
    squares = np.asarray(_moved(tuple(raw), tuple(s.path.stat().st_mtime_ns for s in raw)))
    steps = [snapshot.step for snapshot in raw]
    between = [variance_between(step_variance, a, b) for a, b in itertools.pairwise(steps)]
    walked = np.cumsum([0.0, *between])
    walked = np.array([np.mean(walked[lag:] - walked[:-lag]) for lag in (1, 2)])
    own = np.array([variance_between(step_variance, step - 1, step) for step in steps])
    noise = np.array([np.mean(own[lag:] + own[:-lag]) for lag in (1, 2)])
    rate = (squares[1] * noise[0] - squares[0] * noise[1]) / (walked[1] * noise[0] - walked[0] * noise[1])
    rate = max(rate, 1e-3 * squares[1] / walked[1])
    return max(0.0, float((squares[0] / rate - walked[0]) / noise[0])) if rate > 0.0 else 0.0


@functools.lru_cache(maxsize=64)
def _moved(raw: tuple[Snapshot, ...], modified: tuple[int, ...]) -> tuple[float, float]:
    """Mean squared distance of neighbours, and of neighbours but one. Remembered as `_off_by` is."""
    sums, shapes = [0.0, 0.0], raw[0].shapes()
    for part in _parts(shapes):
        before: list[dict[str, Tensor]] = []
        for snapshot in raw:
            now = {name: tensor.double() for name, tensor in snapshot.tensors(part)}
            for lag, earlier in enumerate(reversed(before)):
                sums[lag] += sum(float((now[name] - earlier[name]).square().sum()) for name in part)
            before = [*before[-1:], now]
    return sums[0] / (len(raw) - 1), sums[1] / (len(raw) - 2)


def combine(
    snapshots: Sequence[Snapshot], coefficients: Sequence[float] | FloatArray, shapes: Mapping[str, torch.Size]
) -> Iterator[tuple[str, Tensor]]:
    """The sum of coefficient x snapshot, tensor by tensor, fp32 on the CPU, summed in float64.

    The tensors go through in parts of at most an eighth of the model, so that the float64 sums take a quarter of it, in one
    buffer for all parts; only one file is open at a time.
    """
    parts = list(_parts(shapes))
    buffer = torch.empty(max((_numel(part, shapes) for part in parts), default=0), dtype=torch.float64)
    for part in parts:
        zeros = buffer[: _numel(part, shapes)].zero_()
        slices = torch.split(zeros, [shapes[name].numel() for name in part])
        sums = {name: flat.view(shapes[name]) for name, flat in zip(part, slices, strict=True)}
        for snapshot, coefficient in zip(snapshots, coefficients, strict=True):
            for name, tensor in snapshot.tensors(part):
                sums[name].add_(tensor, alpha=float(coefficient))  # promotes block-wise, without a float64 copy
        for name, total in sums.items():
            yield name, total.float()


def _numel(names: Sequence[str], shapes: Mapping[str, torch.Size]) -> int:
    return sum(shapes[name].numel() for name in names)


def _parts(shapes: Mapping[str, torch.Size]) -> Iterator[list[str]]:
    limit = sum(shape.numel() for shape in shapes.values()) // 8
    part: list[str] = []
    numel = 0
    for name, shape in shapes.items():
        if part and numel + shape.numel() > limit:
            yield part
            part, numel = [], 0
        part.append(name)
        numel += shape.numel()
    if part:
        yield part


def _check_shapes(snapshot: Snapshot, expected: Mapping[str, torch.Size]) -> None:
    given = {name: torch.empty(shape, device="meta") for name, shape in snapshot.shapes().items()}
    check_tensors(given, expected, f"{snapshot.path}: not of the same model as the other snapshots")


def _nearest_steps(step: int, steps: Sequence[int]) -> str:
    if not steps:
        return "there are no snapshots at all"
    nearest = sorted(sorted(steps, key=lambda stored: abs(stored - step))[:3])
    return f"the nearest are {', '.join(map(str, nearest))}"


def _stored(snapshot: Snapshot) -> Stored:
    return Stored(snapshot.step, snapshot.profile, snapshot.every, snapshot.roundoff())
