"""Averages whose half-life is a length or a share of training: what EDM, FastGen and torchtitan keep."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ddpm_ema.averaging.checks import check_positive
from ddpm_ema.averaging.profiles import ClosedForm, FloatArray, Lengths


def _digamma(x: FloatArray) -> FloatArray:
    """psi(x) for x >= 0 in float64; minus infinity at 0. The n-th harmonic number is psi(n + 1) plus a constant."""
    # psi(x) = psi(x + 16) - sum of 1 / (x + k), k < 16, and the asymptotic series of psi(y): Abramowitz & Stegun 6.3.6, 6.3.18.
    y = x + 16.0
    series = np.log(y) - 0.5 / y - np.polyval([1 / 132, -1 / 240, 1 / 252, -1 / 120, 1 / 12, 0.0], y**-2)
    return np.asarray(series - sum(1.0 / (x + k) for k in range(16)))


@dataclass(frozen=True, repr=False)
class HalfLife(ClosedForm):
    """A constant decay by its half-life, shorter while training is young: min(`half_life`, `ramp_up` x steps before this one).

    What EDM (Karras et al. 2022) keeps, and after it FastGen, by default with 500 kimg and 0.05. The decay of step t is
    0.5^(1 / min(half_life, ramp_up (t - 1))), so step 1 copies and no initial weights are held. Until the ramp ends, at
    step half_life / ramp_up, it is `HalfLifeShare(ramp_up)` but for O(1/t). Without a ramp it is ConstantDecay(0.5^(1 / half_life)).

    Args:
        half_life: in steps (EDM's images / batch size), positive.
        ramp_up: the longest half-life as a share of the steps so far, positive.
    """

    kind: ClassVar[str] = "half_life"
    lengths: ClassVar[Lengths] = {"half_life": float}
    half_life: float
    ramp_up: float = 0.05

    def __post_init__(self) -> None:
        object.__setattr__(self, "half_life", check_positive("half_life", self.half_life))
        object.__setattr__(self, "ramp_up", check_positive("ramp_up", self.ramp_up))

    def log_mass(self, t: FloatArray) -> FloatArray:
        ramped = np.minimum(t, np.floor(self.half_life / self.ramp_up) + 1.0)
        half_lives = _digamma(ramped) / self.ramp_up + (t - ramped) / self.half_life
        return math.log(2.0) * np.asarray(half_lives)


@dataclass(frozen=True, repr=False)
class HalfLifeShare(ClosedForm):
    """An average whose half-life is always the same share of the steps so far: decay 2^(-1 / (share t)) at step t.

    torchtitan's `half_life_fraction`. Nearly a power function (its cumulative weighting is t^(ln 2 / share) but for
    O(1/t)): gamma = ln 2 / share - 1, 12.86 for 0.05, which is std 0.0629. At step 1 it holds 2^(-1 / share) of the initial weights.

    Args:
        share: the half-life as a share of the steps so far, positive.
    """

    kind: ClassVar[str] = "half_life_share"
    share: float = 0.05

    def __post_init__(self) -> None:
        object.__setattr__(self, "share", check_positive("share", self.share))

    def log_mass(self, t: FloatArray) -> FloatArray:
        return math.log(2.0) / self.share * _digamma(t + 1.0)
