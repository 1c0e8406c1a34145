"""Where and with what a benchmark was measured: the same block in every file under benchmarks/results."""

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]


def environment(*packages: str) -> dict[str, Any]:
    """Processor, GPU where there is one, load of other programs, versions of torch and of `packages`, commit, date (UTC).

    Call it before the measurement: `load` is the mean number of running processes over the minute before.
    """
    found: dict[str, Any] = {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
    }
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "driver": _said("nvidia-smi", "--query-gpu=driver_version")}
    versions = {package: importlib.metadata.version(package) for package in ("torch", *packages)}
    found["versions"] = {"python": platform.python_version(), **versions}
    changed = "+" if _said("git", "status", "--porcelain", "--", "ddpm_ema") else ""
    return found | {
        "commit": _said("git", "rev-parse", "--short", "HEAD") + changed,
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }


def _cpu() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _said(*command: str) -> str:
    """First line of what a program prints about this checkout or machine; "" where it cannot."""
    more = ("--format=csv,noheader",) if command[0] == "nvidia-smi" else ()
    try:
        done = subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip().partition("\n")[0]


def save(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a benchmark's results as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
