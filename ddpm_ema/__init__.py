"""ddpm_ema: train a DDPM U-Net while several averages of its weights are kept, and see which weights to ship.

Importing this loads torch, numpy and safetensors alone: the averaging library.
"""

from ddpm_ema.averaging.bank import AverageBank
from ddpm_ema.averaging.coefficients import posthoc_coefficients
from ddpm_ema.averaging.posthoc import reconstruct
from ddpm_ema.averaging.power_function import exponent_to_std, std_to_exponent
from ddpm_ema.averaging.profiles import (
    BiasCorrected,
    ConstantDecay,
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
    "HardCopy",
    "PowerFunction",
    "StochasticWeightAverage",
    "Uniform",
    "Warmup",
    "exponent_to_std",
    "posthoc_coefficients",
    "reconstruct",
    "std_to_exponent",
]
