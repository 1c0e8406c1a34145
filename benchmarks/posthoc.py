"""Averages made after the fact against the same averages kept during training; EDM2's fit beside ours; and where the model breaks.

    python benchmarks/posthoc.py FOLDER [--runs constant cosine ...] [--counts 5 10 20 50] [--output FILE.json] [--figure FILE.png]

Trains the network of `configs/digits.yaml` 3,000 steps at a constant rate, with cosine decay, with a warm-up of a tenth, and at batch
size 4 (a run that is in FOLDER already is taken as it is). Every average below is kept; power functions .05 and .10, `uniform` and raw
are stored every 30 steps. Each kept average is then made from 5, 10, 20 and 50 of the stored ones. The error is that of all weights
as a share of the average's distance from the raw weights; `predicted` is what the library says before it reads a tensor.

EDM2's fit is that of Karras et al. 2024, appendix C.3: least squares of the weightings. The paper solves it for power functions by
closed forms of continuous time; here it is solved over the discrete weightings, by an orthogonal factorisation, for any target.

    python benchmarks/posthoc.py --simulate [--output FILE.json]

makes weights that move otherwise than the model has it, and prints actual / predicted.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from ddpm_ema import config
from ddpm_ema.averaging import (
    RAW,
    BiasCorrected,
    Coefficients,
    ConstantDecay,
    PowerFunction,
    Profile,
    Snapshot,
    StochasticWeightAverage,
    Uniform,
    find_snapshots,
    posthoc_coefficients,
    profile_to_dict,
)
from ddpm_ema.averaging.posthoc import estimate_white_noise

ROOT = Path(__file__).parents[1]
STEPS, STORED_EVERY = 3000, 30
TRAINING: dict[str, dict[str, Any]] = {
    "constant": {},
    "cosine": {"learning_rate_schedule": "cosine"},
    "warmup": {"warmup_steps": STEPS // 10},
    "batch4": {"batch_size": 4},
}
STORED: dict[str, Profile] = {"power_0_05": PowerFunction(0.05), "power_0_10": PowerFunction(0.10), "uniform": Uniform()}
KEPT: dict[str, Profile] = {
    **STORED,
    **{f"power_0_{std:02.0f}": PowerFunction(std / 100) for std in (3, 15, 20, 25)},
    "debiased_0_99": BiasCorrected(0.99),
    "debiased_0_999": BiasCorrected(0.999),
    "debiased_0_9999": BiasCorrected(0.9999),
    "constant_0_9999": ConstantDecay(0.9999),
    "last_20": StochasticWeightAverage(STEPS * 80 // 100 + 1),  # starts at a snapshot
    "last_17": StochasticWeightAverage(STEPS * 83 // 100 + 1),  # does not
}
SETS = {
    "power .05, .10": ["power_0_05", "power_0_10"],
    "power .05, uniform": ["power_0_05", "uniform"],
    "power .05, .10, uniform": ["power_0_05", "power_0_10", "uniform"],
    "raw": ["raw"],
    "raw, uniform": ["raw", "uniform"],
}


def train(folder: Path, name: str) -> Path:
    """The run directory of one run, trained if it is not there."""
    run = folder / name
    if (run / "checkpoints" / f"step-{STEPS:08d}" / "manifest.json").exists():
        return run
    settings = config.to_dict(config.load(ROOT / "configs" / "digits.yaml"))
    settings["output_dir"] = str(run)
    settings["training"] |= {"steps": STEPS, "warmup_steps": 0, "sample_every": 0} | TRAINING[name]
    settings["averages"] = {name: profile_to_dict(profile) for name, profile in KEPT.items()}
    settings["checkpoints"] |= {"every": STEPS // 4, "snapshots_every": STORED_EVERY, "snapshots": [*STORED, "raw"]}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings))
    subprocess.run([sys.executable, ROOT / "scripts" / "train.py", "--config", path], check=True)
    return run
