"""What this machine can do, asked before any data is read. The doctor asks, too, where torch may be missing: it is imported late."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

from ddpm_ema.errors import UserError

if TYPE_CHECKING:
    from ddpm_ema.config import EvaluationSettings, MachineSettings, TrainingSettings


def cpp_compiler() -> str | None:
    """The C++ compiler that torch.compile takes, as torch looks for it."""
    return shutil.which(os.environ.get("CXX", "g++"))


def check(section: str, settings: TrainingSettings | EvaluationSettings, machine: MachineSettings) -> None:
    """Raises UserError for a precision or compilation that this machine cannot do. `section`: `training` or `evaluation`."""
    import torch

    on_cuda = machine.device != "cpu" and torch.cuda.is_available()
    if settings.mixed_precision == "bf16" and on_cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(f"{section}.mixed_precision: this GPU has no bf16; use fp16 or no")
    if settings.compile and not on_cuda and cpp_compiler() is None:
        raise UserError(
            f"{section}.compile: torch.compile needs a C++ compiler on CPU, and there is no g++ here; set it to false"
        )
