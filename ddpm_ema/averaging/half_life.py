"""Averages defined by their half-life, a length or a share of training: the rules of EDM, FastGen and torchtitan."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ddpm_ema.averaging.checks import check_positive
from ddpm_ema.averaging.profiles import Checks, ClosedForm, FloatArray, Lengths


def _digamma(x: FloatArray) -> FloatArray:
    """psi(x) for x >= 0 in float64; minus infinity at 0. The n-th harmonic number is psi(n + 1) plus a constant."""
    # psi(x) = psi(x + 16) - sum of 1 / (x + k), k < 16, and the asymptotic series of psi(y): Abramowitz & Stegun 6.3.6, 6.3.18.
    y = x + 16.0
    series = np.log(y) - 0.5 / y - np.polyval([1 / 132, -1 / 240, 1 / 252, -1 / 120, 1 / 12, 0.0], y**-2)
    return np.asarray(series - sum(1.0 / (x + k) for k in range(16)))


@dataclass(frozen=True, repr=False)
class HalfLife(ClosedForm):
    """A constant decay by its half-life, ramped up: decay 0.5^(1 / min(half_life, ramp_up (t - 1))) at step t.

    The rule of EDM (Karras et al. 2022) and FastGen, by default with 500 kimg and 0.05. It holds nothing of the initial weights.
    Until step half_life / ramp_up it equals `HalfLifeShare(ramp_up)` up to O(1/t).

    Args:
        half_life: in steps (EDM's images / batch size), positive.
        ramp_up: the longest half-life as a share of the steps so far, positive.
    """

    kind: ClassVar[str] = "half_life"
    lengths: ClassVar[Lengths] = {"half_life": float}
    checks: ClassVar[Checks] = {"half_life": check_positive, "ramp_up": check_positive}
    half_life: float
    ramp_up: float = 0.05

    def log_mass(self, t: FloatArray) -> FloatArray:
        ramped = np.minimum(t, np.floor(self.half_life / self.ramp_up) + 1.0)
        half_lives = _digamma(ramped) / self.ramp_up + (t - ramped) / self.half_life
        return math.log(2.0) * np.asarray(half_lives)


@dataclass(frozen=True, repr=False)
class HalfLifeShare(ClosedForm):
    """An average whose half-life is a constant share of the steps so far: decay 2^(-1 / (share t)) at step t.

    torchtitan's `half_life_fraction`. Up to O(1/t) its cumulative weighting is t^(ln 2 / share), that of a power function with
    gamma = ln 2 / share - 1: 12.86 for 0.05, which is std 0.0629. At step 1 it holds 2^(-1 / share) of the initial weights.

    Args:
        share: the half-life as a share of the steps so far, positive.
    """

    kind: ClassVar[str] = "half_life_share"
    checks: ClassVar[Checks] = {"share": check_positive}
    share: float = 0.05

    def log_mass(self, t: FloatArray) -> FloatArray:
        return math.log(2.0) / self.share * _digamma(t + 1.0)
