"""Post-hoc EMA on files: any averaging profile as a linear combination of stored averages.

`coefficients.py` computes the coefficients. Tensors are read one file at a time, a bounded part of the model at a time.
"""

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
    StepVariance,
    Stored,
    as_profile,
    expected_distance,
    solve,
    variance_between,
)
from ddpm_ema.averaging.naming import check_tensors, parts
from ddpm_ema.averaging.profiles import FloatArray, Profile
from ddpm_ema.averaging.snapshots import Snapshot

MAX_MISPREDICTION = 2.0
"""A check warns where the actual error is this many times the predicted one, and"""
MIN_CHECKED_ERROR = 0.01
"""at least this share of the average's distance from the raw weights."""


@dataclass(frozen=True)
class Check:
    """A stored average, reconstructed from the others and compared with itself; errors are shares of its distance from raw."""

    name: str  # of its file
    profile: Profile
    predicted: float
    actual: float

    def warnings(self) -> list[str]:
        """A sentence where the prediction was far too good; none where it was not."""
        if self.actual < max(MAX_MISPREDICTION * self.predicted, MIN_CHECKED_ERROR):
            return []
        found = f"Check: {self.name}, rebuilt from the other snapshots, is off by {self.actual:.1%} where"
        return [f"{found} {self.predicted:.1%} was predicted. Errors predicted for this run may be as much too low."]


@dataclass(frozen=True)
class Fit:
    """How an average of profile `target` at `step` is made from stored ones, without tensors."""

    step: int
    target: Profile
    snapshots: tuple[Snapshot, ...]  # in the order of `coefficients.weights`
    coefficients: Coefficients
    step_variance: StepVariance | None
    white_noise: float  # as given to `fit`, or estimated
    magnitude: float  # estimated, as of `posthoc_coefficients`

    @property
    def identity(self) -> list[Any]:
        """What the coefficients depend on beside the files and the target, as plain values."""
        steps = [snapshot.step for snapshot in self.snapshots]
        moved = [variance_between(self.step_variance, a, b) for a, b in itertools.pairwise([0, *dict.fromkeys(steps)])]
        return [FIT_VERSION, self.step, *(f"{variance:.9g}" for variance in moved)]

    def warnings(self, check: Check | None = None) -> list[str]:
        """Reasons not to trust it, in plain sentences."""
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
        combined = {n: t.float() for n, t in combine(self.snapshots, self.coefficients.weights, shapes)}
        return {name: combined[name] for name in shapes}

    def checked(self, kept: Iterable[Snapshot] = ()) -> Check | None:
        """Reconstruct the stored average whose profile is nearest to the target from the other snapshots; reads all files once.

        None where raw or every average is missing at `step`, also among what else was `kept` there, or there is nothing to
        reconstruct one from. Raises as `reconstruct`.
        """
        here = [snapshot for snapshot in (*self.snapshots, *kept) if snapshot.step == self.step]
        raw = next((snapshot for snapshot in here if snapshot.profile == RAW), None)
        candidate = min((snapshot for snapshot in here if snapshot.profile != RAW), key=self._apart, default=None)
        rest = [s for s in self.snapshots if candidate and (s.step, s.profile) != (self.step, candidate.profile)]
        if raw is None or candidate is None or not rest:
            return None
        found = solve([_stored(s) for s in rest], [_stored(candidate)], *self._model)[0]
        unit = _norm([raw, candidate], [1.0, -1.0])
        error = _norm([*rest, candidate], [*found.weights.tolist(), -1.0])
        actual = error / unit if unit else 0.0
        return Check(candidate.path.stem, candidate.profile, found.predicted_relative_error or 0.0, actual)

    @property
    def _model(self) -> tuple[StepVariance | None, float, float]:
        return self.step_variance, self.white_noise, self.magnitude

    def _apart(self, snapshot: Snapshot) -> float:
        """Expected distance of a stored average from the target, as a share of the target's distance from raw."""
        alone = solve([_stored(snapshot)], [Stored(self.step, self.target)], *self._model)[0]
        return alone.predicted_relative_error or 0.0


@dataclass(frozen=True)
class Reconstruction:
    """A reconstructed average.

    Attributes:
        weights: parameter name -> fp32 CPU tensor, in the order of the files: pair them by name.
        fit: how it was made.
        check: how well another average, which was stored, was predicted; None where there was none.
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
        """Reasons not to trust it, in plain sentences."""
        return self.fit.warnings(self.check)


def fit(
    snapshots: Iterable[Snapshot],
    step_out: int,
    target: float | Profile,
    *,
    step_variance: StepVariance | None = None,
    white_noise: float | None = None,
) -> Fit:
    """`reconstruct` without the tensors: snapshots, coefficients and predicted error. Same arguments and errors."""
    snapshots = sorted(snapshots, key=lambda snapshot: snapshot.step)
    steps = sorted({snapshot.step for snapshot in snapshots if snapshot.step > 0})
    if step_out not in steps:
        raise ValueError(f"step {step_out} was not stored; {_nearest_steps(step_out, steps)}")
    used = tuple(snapshot for snapshot in snapshots if snapshot.step <= step_out)
    for snapshot in used:
        what = f"{snapshot.path}: not of the same model as the other snapshots"
        check_tensors(snapshot.shapes(), used[-1].shapes(), what)
    if white_noise is None:
        white_noise = estimate_white_noise([s for s in used if s.profile == RAW and s.step > 0], step_variance)
    magnitude = _magnitude(used[0], used[-1], step_variance)
    wanted, model = as_profile(target), (step_variance, white_noise, magnitude)
    coefficients = solve([_stored(snapshot) for snapshot in used], [Stored(step_out, wanted)], *model)[0]
    return Fit(step_out, wanted, used, coefficients, *model)


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
    """The average with the target profile at `step_out`, from stored averages of other profiles.

    Memory is at most that of two models (or the result and three and a half times the largest tensor).

    Args:
        snapshots: stored averages, in any order, of any profiles, `RAW` included; later ones than `step_out` are not used.
        step_out: a step at which a snapshot was stored.
        target: a power-function width, or any profile.
        step_variance: as of `posthoc_coefficients`: give learning_rate(t)^2 where the rate warms up or decays.
        white_noise: as of `posthoc_coefficients`; None estimates it from three raw snapshots or more.
        check: also reconstruct an average that was stored at `step_out` from the others, if raw weights were stored there, too.
            Reads every file once more.
        kept: other raw weights or averages that were stored at `step_out`, for the check alone.

    Raises:
        ValueError: no snapshot was stored at `step_out` (the nearest steps are named), one is given twice, two hold different
            tensors (each is named), a file is not a snapshot, or a bad width.
        OSError: a file cannot be read.
    """
    found = fit(snapshots, step_out, target, step_variance=step_variance, white_noise=white_noise)
    return Reconstruction(found.combined(), found, found.checked(kept) if check else None)


def _magnitude(first: Snapshot, last: Snapshot, step_variance: StepVariance | None) -> float:
    """|theta| / sqrt(sum v), from the distance between two stored averages."""
    moved = _norm([first, last], [-1.0, 1.0])
    expected = expected_distance(_stored(first), _stored(last), step_variance)
    return _norm([last], [1.0]) * expected / moved if moved > 0.0 else 1.0


def estimate_white_noise(raw: Sequence[Snapshot], step_variance: StepVariance | None = None) -> float:
    """`white_noise` of `posthoc_coefficients` from raw checkpoints of one run, by step; 0 for fewer than three.

    |theta_i - theta_j|^2 is expected to be proportional to the sum of v between i and j plus white_noise (v_i + v_j). Its means
    over neighbours and over next neighbours give the two unknowns.
    """
    if len(raw) < 3:
        return 0.0
    lags, squares = (1, 2), _neighbour_squares(tuple(raw), _modified(raw))
    between = [variance_between(step_variance, a.step, b.step) for a, b in itertools.pairwise(raw)]
    walked = np.cumsum([0.0, *between])
    walked = np.array([np.mean(walked[lag:] - walked[:-lag]) for lag in lags])
    own = np.array([variance_between(step_variance, snapshot.step - 1, snapshot.step) for snapshot in raw])
    noise = np.array([np.mean(own[lag:] + own[:-lag]) for lag in lags])
    rate = (squares[1] * noise[0] - squares[0] * noise[1]) / (walked[1] * noise[0] - walked[0] * noise[1])
    rate = max(rate, 1e-3 * squares[1] / walked[1])
    return max(0.0, float((squares[0] / rate - walked[0]) / noise[0])) if rate > 0.0 else 0.0


def _modified(files: Sequence[Snapshot]) -> tuple[int, ...]:
    return tuple(snapshot.path.stat().st_mtime_ns for snapshot in files)


@functools.lru_cache(maxsize=64)
def _neighbour_squares(files: tuple[Snapshot, ...], modified: tuple[int, ...]) -> tuple[float, float]:
    """Mean squared distances of neighbours and of next neighbours; every tensor is read once."""
    totals = [0.0, 0.0]
    for part in _eighths(files[-1].shapes()):
        before: list[dict[str, Tensor]] = []  # the next file's neighbour first
        for snapshot in files:
            here = {name: tensor.double() for name, tensor in snapshot.tensors(list(part))}
            for lag, there in enumerate(before):
                totals[lag] += sum(float((here[name] - there[name]).square().sum()) for name in here)
            before = [here, *before[:1]]
    return totals[0] / (len(files) - 1), totals[1] / (len(files) - 2)


def _norm(files: Sequence[Snapshot], coefficients: Sequence[float]) -> float:
    """L2 norm of a combination of files, over all tensors; remembered until a file changes."""
    return _remembered_norm(tuple(files), tuple(coefficients), _modified(files))


@functools.lru_cache(maxsize=1024)  # the targets of a sweep share their checks, and the fits of a run its magnitude
def _remembered_norm(files: tuple[Snapshot, ...], coefficients: tuple[float, ...], modified: tuple[int, ...]) -> float:
    return math.sqrt(sum(float(t.square().sum()) for _, t in combine(files, coefficients, files[-1].shapes())))


def combine(
    snapshots: Sequence[Snapshot], coefficients: Sequence[float] | FloatArray, shapes: Mapping[str, torch.Size]
) -> Iterator[tuple[str, Tensor]]:
    """The sum of coefficient x snapshot, tensor by tensor, float64 on the CPU; the next tensors overwrite the last.

    Parts of at most an eighth of the model are summed in one buffer, a quarter of the model in float64. One file is open at a
    time.
    """
    split = _eighths(shapes)
    buffer = torch.empty(max((sum(part.values()) for part in split), default=0), dtype=torch.float64)
    for part in split:
        slices = torch.split(buffer[: sum(part.values())].zero_(), list(part.values()))
        sums = {name: flat.view(shapes[name]) for name, flat in zip(part, slices, strict=True)}
        for snapshot, coefficient in zip(snapshots, coefficients, strict=True):
            for name, tensor in snapshot.tensors(list(part)):
                sums[name].add_(tensor, alpha=float(coefficient))  # promotes block-wise, without a float64 copy
        yield from sums.items()


def _eighths(shapes: Mapping[str, torch.Size]) -> list[dict[str, int]]:
    """Names and sizes of all tensors, in parts of at most an eighth of the model (or one tensor)."""
    sizes = {name: shape.numel() for name, shape in shapes.items()}
    return [{name: sizes[name] for name in part} for part in parts(sizes, sum(sizes.values()) // 8)]


def _nearest_steps(step: int, steps: Sequence[int]) -> str:
    if not steps:
        return "there are no snapshots at all"
    nearest = sorted(sorted(steps, key=lambda stored: abs(stored - step))[:3])
    return f"the nearest are {', '.join(map(str, nearest))}"


def _stored(snapshot: Snapshot) -> Stored:
    return Stored(snapshot.step, snapshot.profile, snapshot.every, snapshot.roundoff())
