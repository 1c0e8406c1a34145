"""The rules of averaging are imported without torch, and every public name is found when it is asked for."""

import subprocess
import sys
from pathlib import Path

import pytest

import ddpm_ema
from ddpm_ema import averaging

LIGHT = ["profiles", "lengths", "half_life", "cooldown", "sigma_rel", "coefficients", "diffusers_decay", "plan"]


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    return done.stdout.strip()


def test_the_rules_and_the_fit_are_imported_without_torch_and_all_rules_are_known() -> None:
    modules = ", ".join(f"ddpm_ema.averaging.{name}" for name in LIGHT)
    code = f"import {modules}, sys; print('torch' in sys.modules, *ddpm_ema.averaging.profiles.PROFILES)"
    assert run(code).split() == ["False", *averaging.PROFILES]


@pytest.mark.parametrize("module", [ddpm_ema, averaging])
def test_every_public_name_is_found(module) -> None:
    assert all(getattr(module, name) is not None for name in module.__all__)
    with pytest.raises(AttributeError, match=f"module '{module.__name__}' has no attribute 'AverageBnak'"):
        _ = module.AverageBnak
