"""ddpm_ema: train a DDPM U-Net while several averages of its weights are kept, and see which weights to ship.

Importing this loads torch, numpy and safetensors alone: the averaging library.
"""

from typing import Any

from ddpm_ema.averaging.bank import AverageBank
from ddpm_ema.averaging.coefficients import posthoc_coefficients
from ddpm_ema.averaging.cooldown import CosineCooldown, SqrtCooldown, Window
from ddpm_ema.averaging.half_life import HalfLife, HalfLifeShare
from ddpm_ema.averaging.posthoc import reconstruct
from ddpm_ema.averaging.power_function import exponent_to_std, std_to_exponent
from ddpm_ema.averaging.profiles import (
    BiasCorrected,
    ConstantDecay,
    Delayed,
    HardCopy,
    PowerFunction,
    StochasticWeightAverage,
    Uniform,
    Warmup,
)

__all__ = [
    "AverageBank",
    "BiasCorrected",
    "ConstantDecay",
    "CosineCooldown",
    "Delayed",
    "HalfLife",
    "HalfLifeShare",
    "HardCopy",
    "PowerFunction",
    "SqrtCooldown",
    "StochasticWeightAverage",
    "Uniform",
    "Warmup",
    "Window",
    "exponent_to_std",
    "posthoc_coefficients",
    "reconstruct",
    "std_to_exponent",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":  # read from the installed metadata, when asked for
        from importlib.metadata import version

        return version("ddpm_ema")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
