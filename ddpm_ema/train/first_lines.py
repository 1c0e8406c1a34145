"""Lines before the first step: which program runs, and what the intervals will do."""

from __future__ import annotations

import subprocess
from pathlib import Path

import torch

import ddpm_ema
from ddpm_ema.config import Config


def version() -> str:
    """`ddpm_ema 0.1.0 (commit 1a2b3c4, changed), torch 2.15.0, CUDA 13.2`; the commit where the program runs from a checkout."""
    root = Path(__file__).parents[2]
    commit = _git(root, "rev-parse", "--short", "HEAD") if (root / ".git").exists() else ""
    changed = ", changed" if commit and _git(root, "status", "--porcelain", "--untracked-files=no") else ""
    made = f" (commit {commit}{changed})" if commit else ""
    return (
        f"ddpm_ema {ddpm_ema.__version__}{made}, torch {torch.__version__}, CUDA {torch.version.cuda or 'not built in'}"
    )


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def intervals(config: Config) -> str:
    """How many rows, checkpoints, snapshots, grids and quick scorings a run will have."""
    training, checkpoints = config.training, config.checkpoints
    parts = {"rows of metrics": training.log_every, "checkpoints": checkpoints.every}
    parts |= {"snapshots": checkpoints.snapshots_every, "sample grids": training.sample_every}
    parts |= {"quick scorings": config.evaluation.every}
    return ", ".join(
        f"{training.steps // every:,} {what} (every {every:,} steps)" if every else f"no {what}"
        for what, every in parts.items()
    )
