"""Settings: `settings` defines, `agreement` compares, `loading` reads files, `command_line` reads arguments and renders `--help`.

A configuration is YAML validated by pydantic: an unknown key is an error, and values are frozen. `load` is the way in for a
file, `parse` for a command line.
"""

from ddpm_ema.config.agreement import chosen, differing, effects
from ddpm_ema.config.command_line import parse, resolve, show_help, split
from ddpm_ema.config.loading import digest, load, require_named, to_dict, to_yaml, validate
from ddpm_ema.config.settings import (
    Config,
    DataSettings,
    DiffusionSettings,
    Effect,
    EvaluationSettings,
    MachineSettings,
    SweepSettings,
    TrainingSettings,
)
