"""The mean of the last steps, and emulated learning-rate decay, for runs at a constant rate (WSM: Tian et al. 2025, arXiv 2507.17634).

A rate factor r(u), u = (t - (T - D)) / D, that falls from r(0) = 1 to r(1) = 0 over the last D of T steps is emulated, to first
order, by the average with cumulative weighting P(t) = 1 - r(u_t). docs/averaging.md derives it.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ddpm_ema.averaging.checks import check_count
from ddpm_ema.averaging.profiles import Checks, ClosedForm, FloatArray, Lengths


@dataclass(frozen=True, repr=False)
class Cooldown(ClosedForm):
    """An average over the last `length` of `end` steps. Before them it equals the parameters, after `end` it stays unchanged.

    At a step in between it emulates a decay that reaches 0 at that step; `Window` and `SqrtCooldown` keep its shape.

    Args:
        length: number of steps in the average, 1 to `end`.
        end: the last step of the run, or the step of a reconstruction.
    """

    lengths: ClassVar[Lengths] = {"length": int, "end": int}
    checks: ClassVar[Checks] = {"length": check_count, "end": check_count}
    length: int
    end: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length > self.end:
            raise ValueError(f"length: expected at most `end`, {self.end} steps, got {self.length}")

    @abstractmethod
    def decayed(self, u: FloatArray) -> FloatArray:
        """1 - r(u), the cumulative weighting at the share u, in [0, 1], of the decay."""

    def time_constant(self, step: int) -> None:
        """None: the decay differs at every step; `length` is the scale of the average."""

    def log_mass(self, t: FloatArray) -> FloatArray:
        return np.log(self.decayed(np.clip((t - (self.end - self.length)) / self.length, 0.0, 1.0)))


class Window(Cooldown):
    """The mean of the last `length` steps; it emulates a linear decay of the learning rate, r(u) = 1 - u."""

    kind: ClassVar[str] = "window"

    def decayed(self, u: FloatArray) -> FloatArray:
        return u


class CosineCooldown(Cooldown):
    """Emulates a cosine decay of the learning rate, r(u) = (1 + cos(pi u)) / 2: the largest weights are mid-window."""

    kind: ClassVar[str] = "cosine_cooldown"

    def decayed(self, u: FloatArray) -> FloatArray:
        return np.asarray(np.sin(0.5 * np.pi * u) ** 2)


class SqrtCooldown(Cooldown):
    """Emulates a 1-sqrt decay of the learning rate, r(u) = 1 - sqrt(u): the largest weights begin the window."""

    kind: ClassVar[str] = "sqrt_cooldown"

    def decayed(self, u: FloatArray) -> FloatArray:
        return np.sqrt(u)
