"""Averages of weights: profiles, the bank that keeps them, and any average after the fact.

A library of its own: it imports torch, numpy and safetensors.
"""

from ddpm_ema.averaging.bank import AverageBank, merge_states
from ddpm_ema.averaging.coefficients import RAW, Coefficients, posthoc_coefficients
from ddpm_ema.averaging.posthoc import Reconstruction, reconstruct
from ddpm_ema.averaging.power_function import exponent_to_std, std_to_exponent
from ddpm_ema.averaging.profiles import (
    PROFILES,
    BiasCorrected,
    ConstantDecay,
    HardCopy,
    PowerFunction,
    Profile,
    StochasticWeightAverage,
    Uniform,
    Warmup,
    profile_from_dict,
    profile_to_dict,
)
from ddpm_ema.averaging.snapshots import Snapshot, find_snapshots, write_snapshot

__all__ = [
    "PROFILES",
    "RAW",
    "AverageBank",
    "BiasCorrected",
    "Coefficients",
    "ConstantDecay",
    "HardCopy",
    "PowerFunction",
    "Profile",
    "Reconstruction",
    "Snapshot",
    "StochasticWeightAverage",
    "Uniform",
    "Warmup",
    "exponent_to_std",
    "find_snapshots",
    "merge_states",
    "posthoc_coefficients",
    "profile_from_dict",
    "profile_to_dict",
    "reconstruct",
    "std_to_exponent",
    "write_snapshot",
]
