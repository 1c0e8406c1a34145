"""Saving and loading a training run: ours beside accelerate's `save_state` and `load_state`, in one process.

    python benchmarks/checkpoints.py [--rounds 7] [--output benchmarks/results/checkpoints.json]

Both hold the same 9.0 M-parameter U-Net, Adam after one step, and three averages (accelerate's are diffusers EMAModels, registered
for checkpointing). They take turns, and are compared round by round. What each does beside writing differs, so three times are
given of a save:

    blocked    until training can go on: ours copies to host memory and writes in the background
    written    until the files are there: ours also has their sha256 and an fsync, so that a kill or a power cut leaves a whole one
    loaded     until a fresh trainer holds the state: ours verifies every sha256 first
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from environment import environment, save

from ddpm_ema import config, model, train
from ddpm_ema.distributed import Processes
from ddpm_ema.rundir import RunDir
from ddpm_ema.train import checkpointing, resume

AVERAGES = {name: {"kind": "power_function", "std": std} for name, std in {"a": 0.05, "b": 0.1, "c": 0.15}.items()}


def settings(folder: Path) -> config.Config:
    return config.validate(
        {
            "output_dir": str(folder),
            "data": {"source": "digits", "image_size": 32, "channels": 3},
            "model": {"block_out_channels": [64, 128, 128, 128], "attention": [False, True, False, False]},
            "training": {"batch_size": 2, "steps": 10},
            "checkpoints": {"keep": 2, "every": 1},
            "averages": AVERAGES,
        }
    )


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class Ours:
    def __init__(self, folder: Path) -> None:
        self.run, self.processes = settings(folder), Processes.start("cpu")
        self.trainer = train.build(self.run, self.processes, RunDir(folder))
        for parameter in self.trainer.network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.trainer.optimizer.step()
        self.trainer.bank.update(1)

    def __call__(self) -> dict[str, float]:
        self.trainer.step += 1
        blocked = seconds(lambda: checkpointing.save(self.trainer))
        written = blocked + seconds(lambda: checkpointing.finish_saving(self.trainer))
        manifest = resume.manifest_to_resume(self.run, RunDir(self.run.output_dir), self.processes)
        return {
            "blocked": blocked,
            "written": written,
            "loaded": seconds(lambda: resume.restore(self.trainer, manifest)),
        }


class Accelerates:
    def __init__(self, folder: Path) -> None:
        self.folder, self.accelerator = folder, Accelerator(cpu=True)
        network = model.build(settings(folder))
        self.network, self.optimizer = self.accelerator.prepare(network, torch.optim.Adam(network.parameters()))
        averages = [EMAModel(network.parameters(), foreach=True) for _ in AVERAGES]
        self.accelerator.register_for_checkpointing(*averages)
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()

    def __call__(self) -> dict[str, float]:
        shutil.rmtree(self.folder, ignore_errors=True)
        written = seconds(lambda: self.accelerator.save_state(str(self.folder)))
        loaded = seconds(lambda: self.accelerator.load_state(str(self.folder)))
        return {"blocked": written, "written": written, "loaded": loaded}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "checkpoints.json")
    arguments = parser.parse_args()
    here = environment("accelerate", "diffusers")
    with tempfile.TemporaryDirectory() as folder:
        contenders: dict[str, Callable[[], dict[str, float]]] = {
            "ddpm_ema": Ours(Path(folder) / "ours"),
            "accelerate save_state": Accelerates(Path(folder) / "accelerate"),
        }
        for work in contenders.values():
            work()
        rounds = [{name: work() for name, work in contenders.items()} for _ in range(arguments.rounds)]
    rows = []
    for name in contenders:
        for part in ("blocked", "written", "loaded"):
            ratios = sorted(turn[name][part] / turn["ddpm_ema"][part] for turn in rounds)
            row = {
                "contender": name,
                "part": part,
                "seconds": statistics.median(turn[name][part] for turn in rounds),
                "times_ours": statistics.median(ratios),
                "lowest": ratios[0],
                "highest": ratios[-1],
            }
            rows.append(row)
            print(
                f"{name:24} {part:8} {row['seconds']:7.3f} s   {row['times_ours']:5.2f} × ours ({ratios[0]:.2f}–{ratios[-1]:.2f})"
            )
    save(arguments.output, {"environment": here, "rounds": arguments.rounds, "rows": rows})


if __name__ == "__main__":
    main()
