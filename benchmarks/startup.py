"""What a person waits for before the first step: imports, `--help`, and launch to first step, each in fresh processes.

    python benchmarks/startup.py [--rounds 5] [--compile] [--output benchmarks/results/startup.json]

Contenders take turns; `times ours` compares round by round. The last two rows are of this program alone: from the command to the
first finished optimizer step of `configs/digits.yaml` on one process, without and (with --compile, minutes) with torch.compile.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from environment import environment, save

ROOT = Path(__file__).parents[1]
IMPORTS = {
    "import torch": "import torch",
    "import ddpm_ema (the averages)": "from ddpm_ema import AverageBank",
    "import ema_pytorch": "from ema_pytorch import EMA",
    "import timm.utils.ModelEmaV3": "from timm.utils import ModelEmaV3",
    "import diffusers EMAModel": "from diffusers.training_utils import EMAModel",
}
OURS = "import ddpm_ema (the averages)"
HELP = "ddpm-ema score --help"
FIRST_STEP = "launch to first step"


def run(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    return time.perf_counter() - start


def first_step(compiled: bool) -> float:
    with tempfile.TemporaryDirectory() as folder:
        config = str(ROOT / "configs" / "digits.yaml")
        options = [
            "--output_dir",
            f"{folder}/run",
            "--training.steps",
            "1",
            "--training.compile",
            str(compiled).lower(),
        ]
        options += ["--training.sample_every", "0", "--training.warmup_steps", "0"]
        cache = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/cache"}
        os.environ.update(cache)  # compiled anew in each round
        return run([sys.executable, "-m", "ddpm_ema", "train", "--config", config, *options])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "startup.json")
    arguments = parser.parse_args()
    here = environment("diffusers", "timm", "ema-pytorch")
    work = {name: [sys.executable, "-c", code] for name, code in IMPORTS.items()}
    work[HELP] = [sys.executable, "-m", "ddpm_ema", "score", "--help"]
    for command in work.values():
        run(command)  # compiles bytecode, fills the disk cache
    rounds = [{name: run(command) for name, command in work.items()} for _ in range(arguments.rounds)]
    rows = []
    for name in work:
        ratios = sorted(turn[name] / turn[OURS] for turn in rounds)
        seconds = statistics.median(turn[name] for turn in rounds)
        rows.append(
            {
                "what": name,
                "seconds": seconds,
                "times_ours": statistics.median(ratios),
                "lowest": ratios[0],
                "highest": ratios[-1],
            }
        )
    for compiled in (False, True) if arguments.compile else (False,):
        times = [first_step(compiled) for _ in range(1 if compiled else arguments.rounds)]
        rows.append(
            {
                "what": FIRST_STEP + (", compiled" if compiled else ""),
                "seconds": statistics.median(times),
                "lowest": min(times),
                "highest": max(times),
            }
        )
    for row in rows:
        beside = f"{row['times_ours']:5.2f} × {OURS}" if "times_ours" in row else ""
        print(f"{row['what']:34} {row['seconds']:7.2f} s   {beside}")
    save(arguments.output, {"environment": here, "rounds": arguments.rounds, "rows": rows})


if __name__ == "__main__":
    main()
