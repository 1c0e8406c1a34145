"""The mean of the last steps, and with it learning-rate decay after the fact, for runs at a constant rate.

A run's last D steps, at a constant rate, move the parameters by m_t = theta_{t+1} - theta_t. Had the rate been multiplied by
r(u), u = (t - (T - D)) / D, falling from r(0) = 1 to r(1) = 0, then to first order (every movement in proportion to its rate,
with the gradients of the run as it was)

    decayed theta_T = theta_{T-D} + sum over t = T-D..T-1 of r(u_t) m_t.

An average with cumulative weighting P is, summed by parts, theta_T - sum over t < T of P(t) m_t = theta_{T-D} + sum of
(1 - P(t)) m_t when P(t) = 0 before T - D. So P(t) = 1 - r(u_t) emulates the decay (WSM: Tian et al. 2025, arXiv 2507.17634):
the parameters after step T - D + k get the weight r((k - 1) / D) - r(k / D). A linear decay is the plain mean of the last D steps.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ddpm_ema.averaging.checks import check_count
from ddpm_ema.averaging.profiles import ClosedForm, FloatArray, Lengths


@dataclass(frozen=True, repr=False)
class Cooldown(ClosedForm):
    """An average over the last `length` of `end` steps: a copy of the parameters before them, unchanged after `end`.

    At a step in between it emulates a decay that reaches 0 at that step: `Window` and `SqrtCooldown` one of the same shape.

    Args:
        length: steps that are averaged, 1 to `end`.
        end: the step at which the average is wanted: the last of the run, or the step of a reconstruction.
    """

    lengths: ClassVar[Lengths] = {"length": int, "end": int}
    length: int
    end: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "length", check_count("length", self.length))
        object.__setattr__(self, "end", check_count("end", self.end))
        if self.length > self.end:
            raise ValueError(f"length: expected at most `end`, {self.end} steps, got {self.length}")

    @abstractmethod
    def decayed(self, u: FloatArray) -> FloatArray:
        """1 - r(u): how far the emulated learning rate has come down at the share u, in [0, 1], of the decay."""

    def time_constant(self, step: int) -> None:
        """None: the decay changes with every step, and `length` says what matters."""

    def log_mass(self, t: FloatArray) -> FloatArray:
        return np.log(self.decayed(np.clip((t - (self.end - self.length)) / self.length, 0.0, 1.0)))


class Window(Cooldown):
    """The mean of the last `length` steps, which is a linear decay of the learning rate emulated."""

    kind: ClassVar[str] = "window"

    def decayed(self, u: FloatArray) -> FloatArray:
        return u


class CosineCooldown(Cooldown):
    """A cosine decay of the learning rate emulated, r(u) = (1 + cos(pi u)) / 2: the middle of the window counts most."""

    kind: ClassVar[str] = "cosine_cooldown"

    def decayed(self, u: FloatArray) -> FloatArray:
        return np.asarray(np.sin(0.5 * np.pi * u) ** 2)


class SqrtCooldown(Cooldown):
    """A 1-sqrt decay of the learning rate emulated, r(u) = 1 - sqrt(u): the beginning of the window counts most."""

    kind: ClassVar[str] = "sqrt_cooldown"

    def decayed(self, u: FloatArray) -> FloatArray:
        return np.sqrt(u)
