"""ddpm_ema: train a DDPM U-Net while several averages of its weights are kept, and see which weights to ship.

The names of this module are those of the averaging library, and `load` and `sample` for the weights of a run. Importing it loads
numpy alone; torch comes with the first name that needs it.
"""

from typing import TYPE_CHECKING, Any

from ddpm_ema.averaging.coefficients import posthoc_coefficients
from ddpm_ema.averaging.cooldown import CosineCooldown, SqrtCooldown, Window
from ddpm_ema.averaging.half_life import HalfLife, HalfLifeShare
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
from ddpm_ema.averaging.sigma_rel import exponent_to_std, std_to_exponent

if TYPE_CHECKING:
    from ddpm_ema.averaging.bank import AverageBank
    from ddpm_ema.averaging.posthoc import reconstruct
    from ddpm_ema.from_run import load, sample

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
    "load",
    "posthoc_coefficients",
    "reconstruct",
    "sample",
    "std_to_exponent",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":  # read from the installed metadata, when asked for
        from importlib.metadata import version

        return version("ddpm_ema")
    if name in __all__:
        from importlib import import_module

        return getattr(import_module(f"ddpm_ema.{'from_run' if name in ('load', 'sample') else 'averaging'}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
