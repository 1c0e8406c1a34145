"""What to store of a future training run: which averages, how often, and the predicted errors of reconstructions."""

from collections.abc import Sequence
from dataclasses import dataclass

from ddpm_ema.averaging.coefficients import MAX_PREDICTED_ERROR, RAW, StepVariance, Stored, solve
from ddpm_ema.averaging.profiles import PowerFunction, Profile, Uniform

GOAL = 0.01
"""Predicted relative error below which a plan saves disk instead."""
SETS: tuple[tuple[Profile, ...], ...] = (
    (PowerFunction(0.05), PowerFunction(0.10)),
    (PowerFunction(0.05), Uniform()),
    (PowerFunction(0.05), PowerFunction(0.10), Uniform()),
    (RAW, Uniform()),
    (RAW,),
)
"""Sets of averages to choose from."""
COUNTS = (5, 10, 20, 50, 100, 200)
"""Numbers of snapshots per average to choose from."""


@dataclass(frozen=True)
class Plan:
    """Averages to store every `every` steps and at the last one, and the initial weights once."""

    stored: tuple[Profile, ...]
    every: int
    num_files: int  # initial weights included
    errors: tuple[float | None, ...]  # predicted relative error of each target at the last step; None where it is raw

    def beyond(self, error: float) -> list[int]:
        """Indices of the targets whose error is not below this."""
        return [place for place, found in enumerate(self.errors) if found is not None and found >= error]

    @property
    def badness(self) -> tuple[int, int, int]:
        """Sort key, the best plan first: targets with a warning, targets that miss the goal, files."""
        return len(self.beyond(MAX_PREDICTED_ERROR)), len(self.beyond(GOAL)), self.num_files


def plans(
    steps: int,
    targets: Sequence[Profile],
    max_files: int,
    *,
    step_variance: StepVariance | None = None,
) -> list[Plan]:
    """The best plan for each set of averages that fits into `max_files` files of the model's size, the best of all first.

    `targets` are wanted at the last of `steps`; `step_variance` is as of `posthoc_coefficients`. Raises ValueError for no steps, no
    targets, or too few files for the smallest plan.
    """
    if steps < 1 or not targets:
        raise ValueError(f"steps, targets: expected at least one of each, got {steps} and {len(targets)}")
    best = []
    for stored in SETS:
        spacings = sorted({max(1, steps // count) for count in COUNTS})
        made = [
            _plan(steps, targets, stored, every, step_variance)
            for every in spacings
            if 1 + len(_steps(steps, every)) * len(stored) <= max_files
        ]
        best += [min(made, key=lambda plan: plan.badness)] if made else []
    if not best:
        fewest = 1 + len(_steps(steps, max(1, steps // min(COUNTS))))
        raise ValueError(
            f"no plan fits: the smallest needs {fewest} files of the model's size, there is room for {max_files}"
        )
    return sorted(best, key=lambda plan: plan.badness)


def _steps(steps: int, every: int) -> list[int]:
    return sorted({*range(every, steps + 1, every), steps})


def _plan(
    steps: int, targets: Sequence[Profile], stored: tuple[Profile, ...], every: int, step_variance: StepVariance | None
) -> Plan:
    files = [Stored(0, RAW), *(Stored(step, profile) for step in _steps(steps, every) for profile in stored)]
    found = solve(files, [Stored(steps, target) for target in targets], step_variance)
    return Plan(stored, every, len(files), tuple(one.predicted_relative_error for one in found))
