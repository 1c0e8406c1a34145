"""Any average after the fact: a stored few, combined linearly, stand for one that was never kept.

An average is linear in the parameters after each step, so a combination of averages is an average whose weighting is the
same combination of weightings. Karras et al. 2024 (arXiv 2312.02696, section 3.2, appendix C.3) fit other power-function
widths that way; the same least squares fits every profile that can write its weighting down. Here it is solved over the
discrete weightings themselves, by an orthogonal factorisation instead of normal equations, so that the conditioning is not
squared. The coefficients are held to sum to 1: the combination of averages is an average.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ddpm_ema.averaging.naming import check_tensors
from ddpm_ema.averaging.power_function import power_function_weighting
from ddpm_ema.averaging.profiles import PowerFunction, Profile
from ddpm_ema.averaging.snapshots import Snapshot, find_snapshots, write_snapshot

__all__ = [
    "Coefficients",
    "Reconstruction",
    "Snapshot",
    "find_snapshots",
    "posthoc_coefficients",
    "reconstruct",
    "write_snapshot",
]

FloatArray = npt.NDArray[np.float64]

MAX_PROFILE_ERROR = 0.05
"""Profile error from which a reconstruction is called untrustworthy."""
MAX_ROUNDING = 0.01
"""Relative rounding error (amplification x storage rounding) from which it is."""
MAX_INITIAL_WEIGHT_ERROR = 0.01
"""Wrong weight of the initial parameters from which it is."""
MAX_CONDITION_NUMBER = 1e12
"""Condition number from which float64 coefficients are."""

_CHUNK_STEPS = 1 << 16


@dataclass(frozen=True)
class Coefficients:
    """How to combine stored averages, and how far to trust the result.

    Attributes:
        weights: float64 [num_in], summing to 1.
        condition_number: of the inner products (Gram matrix) of the stored profiles; how delicate the fit is.
        profile_error: relative L2 distance between the weighting asked for and the one got, over steps 1..step_out.
        amplification: L1 norm of the weights: what rounding errors in the stored averages are multiplied by, at most.
        initial_weight_error: how far the weight of the *initial* parameters is from the one asked for. A constant decay still holds
            decay^step of them, which power functions cannot give back; `BiasCorrected` holds none.
    """

    weights: FloatArray
    condition_number: float
    profile_error: float
    amplification: float
    initial_weight_error: float = 0.0

    def warnings(self, roundoff: float = 0.0) -> list[str]:
        """Plain sentences on why the result should not be trusted; none if it may be.

        Args:
            roundoff: largest relative rounding error of the stored averages (2^-24 for fp32, 2^-8 for bf16).
        """
        warnings = []
        if self.profile_error > MAX_PROFILE_ERROR:
            warnings.append(
                f"The stored averages cannot give this profile: its weighting is off by {self.profile_error:.1%}. "
                "Store more snapshots, or ask for a width nearer to theirs."
            )
        if self.initial_weight_error > MAX_INITIAL_WEIGHT_ERROR:
            warnings.append(
                f"The profile gives the initial parameters {self.initial_weight_error:.1%} more or less weight than the "
                "stored averages can. The debiased profile (bias_corrected) gives them none and can be had."
            )
        if self.condition_number > MAX_CONDITION_NUMBER:
            warnings.append(
                f"The stored averages are nearly linearly dependent (condition number {self.condition_number:.1e}): "
                "the coefficients are not determined well. Use fewer snapshots or more different widths."
            )
        rounding = self.amplification * roundoff
        if rounding > MAX_ROUNDING:
            warnings.append(
                f"Rounding in the stored averages is amplified {self.amplification:.3g} times, "
                f"to as much as {rounding:.1%} of a weight. Store the snapshots in fp32."
            )
        return warnings


@dataclass(frozen=True)
class Reconstruction:
    """An average made after the fact.

    Attributes:
        weights: parameter name -> fp32 CPU tensor.
        coefficients: how it was made.
        snapshots: what it was made from, in the order of `coefficients.weights`.
        step: the step it is the average at.
        target: the profile asked for.
        warnings: why it should not be trusted, in plain sentences; empty if it may be.
    """

    weights: dict[str, Tensor]
    coefficients: Coefficients
    snapshots: tuple[Snapshot, ...]
    step: int
    target: Profile
    warnings: list[str]


def posthoc_coefficients(
    steps_in: Sequence[int],
    stds_in: Sequence[float | Profile],
    step_out: int,
    target: float | Profile,
) -> Coefficients:
    """The combination of stored averages whose weighting is nearest to the target's in the L2 sense.

    Args:
        steps_in: steps at which the averages were stored, [num_in], none after `step_out`.
        stds_in: their power-function widths, or any profiles, [num_in].
        step_out: the step to have the target average at.
        target: a power-function width, or any profile.

    Raises:
        ValueError: no or too many averages, lengths that differ, a step out of range, one average given twice, or a bad width.
    """
    steps = [int(step) for step in steps_in]
    profiles = [_as_profile(profile) for profile in stds_in]
    goal = _as_profile(target)
    if not steps or len(steps) != len(profiles):
        raise ValueError(
            f"steps_in, stds_in: expected equally many, at least one; got {len(steps)} and {len(profiles)}"
        )
    for step in steps:
        if not 1 <= step <= step_out:
            raise ValueError(f"steps_in: expected 1 <= step <= step_out = {step_out}, got {step}")
    pairs = list(zip(steps, profiles, strict=True))
    for i, pair in enumerate(pairs):
        if pair in pairs[:i]:
            raise ValueError(f"steps_in, stds_in: {pair[1]!r} at step {pair[0]} is given twice")
    coefficients = _solve(_triangular_factor(pairs, goal, step_out))
    initial_weights = np.array([profile.initial_weight(step) for step, profile in pairs])
    initial_weight_error = abs(float(initial_weights @ coefficients.weights) - goal.initial_weight(step_out))
    return replace(coefficients, initial_weight_error=initial_weight_error)


def reconstruct(snapshots: Iterable[Snapshot], step_out: int, target: float | Profile) -> Reconstruction:
    """The average with the target profile at `step_out`, from stored ones, never kept during training.

    Snapshots are read one file at a time, a bounded part of the tensors at a time; memory is at most that of two models
    (or of three and a half times the largest tensor beyond the result, if a single tensor is most of the model).

    Args:
        snapshots: stored averages, in any order, of any profiles; those after `step_out` are left aside.
        step_out: a step at which a snapshot was stored.
        target: a power-function width, or any profile.

    Raises:
        ValueError: no snapshot was stored at `step_out` (the nearest steps are named), one is given twice, two hold different
            tensors (each is named), a file is not a snapshot, or a bad width.
        OSError: a file cannot be read.
    """
    snapshots = sorted(snapshots, key=lambda snapshot: snapshot.step)
    steps = sorted({snapshot.step for snapshot in snapshots})
    if step_out not in steps:
        raise ValueError(f"step {step_out} was not stored; {_nearest_steps(step_out, steps)}")
    used = tuple(snapshot for snapshot in snapshots if snapshot.step <= step_out)
    goal = _as_profile(target)
    coefficients = posthoc_coefficients([s.step for s in used], [s.profile for s in used], step_out, goal)
    shapes = used[-1].shapes()
    for snapshot in used:
        _check_shapes(snapshot, shapes)
    roundoff = max(snapshot.roundoff() for snapshot in used)
    weights = dict(combine(used, coefficients.weights, shapes))
    return Reconstruction(
        {name: weights[name] for name in shapes}, coefficients, used, step_out, goal, coefficients.warnings(roundoff)
    )


def combine(
    snapshots: Sequence[Snapshot], coefficients: FloatArray, shapes: Mapping[str, torch.Size]
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


def _as_profile(profile: float | Profile) -> Profile:
    return profile if isinstance(profile, Profile) else PowerFunction(std=profile)


def _weighting(
    profile: Profile, step: int, first: int, last: int, cache: dict[tuple[Profile, int], FloatArray]
) -> FloatArray:
    """Weights of the parameters after steps first..last in the average stored at `step`: float64 [last - first + 1]."""
    if isinstance(profile, PowerFunction):  # the usual case has a closed form and needs no whole array
        return power_function_weighting(profile.exponent, step, first, last)
    if (profile, step) not in cache:
        cache[profile, step] = profile.weighting(step)
    part = cache[profile, step][first - 1 : last]
    return np.pad(part, (0, last - first + 1 - len(part)))


def _triangular_factor(stored: Sequence[tuple[int, Profile]], target: Profile, step_out: int) -> FloatArray:
    """R of the QR factorisation of [stored weightings | target weighting], [num_in + 1, num_in + 1].

    The matrix has a row a step, so it is factored a block of rows at a time: R of (R so far on top of the next block).
    """
    columns = [*stored, (step_out, target)]
    factor = np.zeros((0, len(columns)))
    cache: dict[tuple[Profile, int], FloatArray] = {}
    for first in range(1, step_out + 1, _CHUNK_STEPS):
        last = min(first + _CHUNK_STEPS - 1, step_out)
        block = np.stack([_weighting(profile, step, first, last, cache) for step, profile in columns], axis=1)
        factor = np.asarray(np.linalg.qr(np.concatenate([factor, block]), mode="r"))
    if len(factor) < len(columns):  # fewer steps than averages
        factor = np.concatenate([factor, np.zeros((len(columns) - len(factor), len(columns)))])
    return np.asarray(factor, dtype=np.float64)


def _solve(factor: FloatArray) -> Coefficients:
    """Least squares on the triangular factor, over coefficients that sum to 1."""
    stored, goal = factor[:, :-1], factor[:, -1]
    num_in = stored.shape[1]
    # Scaled to unit length, no average counts for less because it was stored early and is short.
    lengths = np.linalg.norm(stored, axis=0)
    singular_values = np.linalg.svd(stored, compute_uv=False)
    condition_number = float((singular_values[0] / singular_values[-1]) ** 2) if singular_values[-1] > 0 else math.inf
    # c = c_0 + N y with sum(c_0) = 1 and N spanning the coefficients that sum to 0. In scaled coefficients z = lengths * c the
    # constraint is a . z = 1 with a = 1 / lengths; the rest of a's orthonormal basis spans N.
    constraint = 1.0 / lengths
    basis = np.linalg.qr(constraint[:, None], mode="complete")[0][:, 1:]
    particular = constraint / (constraint @ constraint)
    scaled = stored / lengths
    free = np.linalg.lstsq(scaled @ basis, goal - scaled @ particular, rcond=None)[0] if num_in > 1 else np.zeros(0)
    weights = (particular + basis @ free) / lengths
    weights = weights / weights.sum()
    error = float(np.linalg.norm(stored @ weights - goal) / np.linalg.norm(goal))
    return Coefficients(
        weights=weights,
        condition_number=condition_number,
        profile_error=error,
        amplification=float(np.abs(weights).sum()),
    )
