"""The decay that diffusers' `EMAModel` really applies."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ddpm_ema.averaging.checks import check_positive, check_real, check_share
from ddpm_ema.averaging.profiles import Checks, FloatArray, ScheduledDecay


@dataclass(frozen=True, repr=False)
class DiffusersDecay(ScheduledDecay):
    """The rule of diffusers' `EMAModel`: a decay that is always warmed up.

    With s = t - update_after_step - 1: 0 while s <= 0, then min(max_decay, (1 + s) / (10 + s)), or with `use_ema_warmup`
    min(max_decay, 1 - (1 + s / inv_gamma)^-power), and never below min_decay (diffusers 0.42, `EMAModel.get_decay`).

    The settings are `EMAModel`'s, but for `max_decay`, its `decay`: decays in [0, 1], update_after_step at least -1, inv_gamma and
    power positive.
    """

    kind: ClassVar[str] = "diffusers_ema"
    checks: ClassVar[Checks] = {
        **dict.fromkeys(("max_decay", "min_decay"), check_share),
        **dict.fromkeys(("inv_gamma", "power"), check_positive),
    }
    max_decay: float = 0.9999
    min_decay: float = 0.0
    update_after_step: int = 0
    use_ema_warmup: bool = False
    inv_gamma: float = 1.0
    power: float = 2.0 / 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_real("update_after_step", self.update_after_step, -1.0, math.inf, "a number of at least -1")
        if self.use_ema_warmup not in (True, False):
            raise ValueError(f"use_ema_warmup: expected true or false, got {self.use_ema_warmup!r}")

    def decays(self, first: int, last: int) -> FloatArray:
        s = np.arange(first, last + 1, dtype=np.float64) - self.update_after_step - 1
        later = np.maximum(s, 1.0)
        if self.use_ema_warmup:
            rising = 1.0 - np.power(1.0 + later / self.inv_gamma, -self.power)
        else:
            rising = (1.0 + later) / (10.0 + later)
        return np.where(s <= 0, 0.0, np.maximum(np.minimum(rising, self.max_decay), self.min_decay))
