"""Averages of weights: profiles, the bank that keeps them, and any average after the fact.

A library of its own: it imports torch, numpy and safetensors.
"""

from ddpm_ema.averaging.bank import AverageBank, merge_states
from ddpm_ema.averaging.coefficients import RAW, Coefficients, posthoc_coefficients
from ddpm_ema.averaging.cooldown import CosineCooldown, SqrtCooldown, Window
from ddpm_ema.averaging.half_life import HalfLife, HalfLifeShare
from ddpm_ema.averaging.interop import DiffusersDecay
from ddpm_ema.averaging.lengths import resolve_lengths
from ddpm_ema.averaging.posthoc import Reconstruction, reconstruct
from ddpm_ema.averaging.power_function import exponent_to_std, std_to_exponent
from ddpm_ema.averaging.profiles import (
    PROFILES,
    BiasCorrected,
    ConstantDecay,
    Delayed,
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
from ddpm_ema.averaging.summary import summarize

__all__ = [
    "PROFILES",
    "RAW",
    "AverageBank",
    "BiasCorrected",
    "Coefficients",
    "ConstantDecay",
    "CosineCooldown",
    "Delayed",
    "DiffusersDecay",
    "HalfLife",
    "HalfLifeShare",
    "HardCopy",
    "PowerFunction",
    "Profile",
    "Reconstruction",
    "Snapshot",
    "SqrtCooldown",
    "StochasticWeightAverage",
    "Uniform",
    "Warmup",
    "Window",
    "exponent_to_std",
    "find_snapshots",
    "merge_states",
    "posthoc_coefficients",
    "profile_from_dict",
    "profile_to_dict",
    "reconstruct",
    "resolve_lengths",
    "std_to_exponent",
    "summarize",
    "write_snapshot",
]
