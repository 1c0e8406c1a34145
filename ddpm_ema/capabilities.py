"""What this machine can do, asked before any data is read."""

import os
import shutil

import torch

from ddpm_ema.config import EvaluationSettings, MachineSettings, TrainingSettings
from ddpm_ema.errors import UserError


def check(section: str, settings: TrainingSettings | EvaluationSettings, machine: MachineSettings) -> None:
    """Raises UserError for a precision or compilation that this machine cannot do. `section`: `training` or `evaluation`."""
    on_cuda = machine.device != "cpu" and torch.cuda.is_available()
    if settings.mixed_precision == "bf16" and on_cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(f"{section}.mixed_precision: this GPU has no bf16; use fp16 or no")
    if settings.compile and not on_cuda and shutil.which(os.environ.get("CXX", "g++")) is None:  # as torch looks for it
        raise UserError(
            f"{section}.compile: torch.compile needs a C++ compiler on CPU, and there is no g++ here; set it to false"
        )
