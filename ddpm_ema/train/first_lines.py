"""Lines before the first step: which program runs, and what the intervals will do."""

import contextlib
import subprocess
from pathlib import Path

import torch

import ddpm_ema
from ddpm_ema.config import Config


def version() -> str:
    """`ddpm_ema 0.1.0 (commit 1a2b3c4, changed), torch 2.15.0, CUDA 13.2`; the commit where the program runs from a checkout."""
    root, commit = Path(__file__).parents[2], ""
    if (root / ".git").exists():
        describe = ["git", "-C", str(root), "describe", "--always", "--dirty=, changed", "--exclude=*"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(describe, capture_output=True, text=True, timeout=10, check=True)
            commit = f" (commit {done.stdout.strip()})"
    cuda = torch.version.cuda or "not built in"
    return f"ddpm_ema {ddpm_ema.__version__}{commit}, torch {torch.__version__}, CUDA {cuda}"


def intervals(config: Config) -> str:
    """How many rows, checkpoints, snapshots, grids and quick scorings a run will have."""
    training, checkpoints = config.training, config.checkpoints
    parts = {"rows of metrics": training.log_every, "checkpoints": checkpoints.every}
    parts |= {"snapshots": checkpoints.snapshots_every, "sample grids": training.sample_every}
    parts |= {"quick scorings": config.evaluation.every}
    return ", ".join(
        f"{training.steps // every:,} {what} (every {f'{every:,} steps' if every > 1 else 'step'})"
        if every
        else f"no {what}"
        for what, every in parts.items()
    )
