"""Averages of weights: rules of averaging, the bank that keeps averages, and post-hoc reconstruction.

A library of its own: it imports torch, numpy and safetensors. The rules need numpy alone, so torch is imported with the first
name that needs it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Importing every rule here puts all of them into PROFILES, whichever submodule is imported first.
from ddpm_ema.averaging.coefficients import RAW, Coefficients, posthoc_coefficients
from ddpm_ema.averaging.cooldown import CosineCooldown, SqrtCooldown, Window
from ddpm_ema.averaging.diffusers_decay import DiffusersDecay
from ddpm_ema.averaging.half_life import HalfLife, HalfLifeShare
from ddpm_ema.averaging.lengths import resolve_lengths
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
from ddpm_ema.averaging.sigma_rel import exponent_to_std, std_to_exponent
from ddpm_ema.averaging.summary import summarize

if TYPE_CHECKING:
    from ddpm_ema.averaging.bank import AverageBank, merge_states
    from ddpm_ema.averaging.batch_norm import update_batch_norm
    from ddpm_ema.averaging.posthoc import Reconstruction, reconstruct
    from ddpm_ema.averaging.snapshots import Snapshot, find_snapshots, write_snapshot

__all__ = ["AverageBank", "merge_states", "update_batch_norm"]
__all__ += ["PROFILES", "Profile", "profile_from_dict", "profile_to_dict", "resolve_lengths", "summarize"]
__all__ += ["BiasCorrected", "ConstantDecay", "Delayed", "DiffusersDecay", "HalfLife", "HalfLifeShare", "HardCopy"]
__all__ += ["PowerFunction", "StochasticWeightAverage", "Uniform", "Warmup", "exponent_to_std", "std_to_exponent"]
__all__ += ["CosineCooldown", "SqrtCooldown", "Window"]
__all__ += ["RAW", "Coefficients", "Reconstruction", "posthoc_coefficients", "reconstruct"]
__all__ += ["Snapshot", "find_snapshots", "write_snapshot"]


def __getattr__(name: str) -> Any:
    for module in ("bank", "batch_norm", "posthoc", "snapshots") if name in __all__ else ():
        if name in vars(found := import_module(f"{__name__}.{module}")):
            return getattr(found, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
