"""SIGKILL at random moments of every stage; each time the end must be that of a run that nobody disturbed, bit for bit.

    python benchmarks/kills.py [--kills 100] [--compiled 5] [--minutes 60] [--seed 0] [--output benchmarks/results/kills.json]

A tiny run of handwritten digits is trained, scored, swept, exported and reported on once, undisturbed. Then each stage is started
on what it started from, all its processes are killed at a moment that is uniform over its undisturbed length, and it is started
again, until it ends by itself: a round. After each round every file must be there and equal (but for the seconds that some hold),
and no other: what a kill left must be gone. Training, score and sweep run on two processes. Prints a table and writes JSON; ends
with 1 if a round did not end equal.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load

CONTEXT = multiprocessing.get_context("forkserver")
PRELOAD = ["accelerate", "torch_fidelity", "ddpm_ema.cli", "ddpm_ema.train", "ddpm_ema.score", "ddpm_ema.export"]
SETTINGS: dict[str, Any] = {
    "data": {"source": "digits", "image_size": 8, "channels": 1},
    "model": {"block_out_channels": [8, 16], "layers_per_block": 1, "attention": [False, True], "norm_num_groups": 4},
    "diffusion": {"num_train_timesteps": 100},
    "training": {"steps": 60, "batch_size": 16, "log_every": 1, "warmup_steps": 4, "sample_every": 10, "sample_images": 4},
    "machine": {"device": "cpu", "timeout": 60.0},
    "averages": {"ema_0_9": {"kind": "constant", "decay": 0.9}, "power_0_10": {"kind": "power_function", "std": 0.10}},
    "checkpoints": {"every": 5, "keep": 3, "snapshots_every": 10, "snapshots": ["raw", "ema_0_9", "power_0_10"]},
    "evaluation": {
        "num_images": 96, "batch_size": 16, "sampler": "ddim", "num_inference_steps": 4, "extractors": ["classifier"],
        "groups": 10, "grid_images": 5,
    },
}  # fmt: skip
SECONDS = (
    "seconds",
    "sampling_seconds",
    "seconds_of",
    "finished",
    "images_per_second",
    "data_wait",
    "save_seconds",
    "peak_memory",
)


@dataclass
class Stage:
    """One command, and what happened to it. `share` is its part of all kills."""

    name: str
    arguments: list[str]
    world_size: int
    share: int
    length: float = 0.0
    kills: int = 0
    rounds: int = 0
    different: list[str] = field(default_factory=list)
    seconds: float = 0.0


def start(arguments: list[str], world_size: int, log: Path) -> list[Any]:
    """The command on so many processes, each as a launcher would start it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = []
    for rank in range(world_size):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        given = {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes.append(CONTEXT.Process(target=_work, args=(arguments, given if world_size > 1 else {}, str(log))))
        processes[-1].start()
    return processes


def _work(arguments: list[str], environment: dict[str, str], log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    os.environ.update(environment)
    from ddpm_ema import cli

    code = cli.main(arguments)
    sys.stdout.flush()
    os._exit(code)


def run(stage: Stage, log: Path, seconds: float | None = None) -> bool:
    """Runs a stage, and kills it after so many seconds; whether it ended by itself."""
    processes = start(stage.arguments, stage.world_size, log)
    deadline = time.monotonic() + (seconds if seconds is not None else 3600)
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    killed = [process for process in processes if process.is_alive()]
    for process in killed:
        os.kill(process.pid, signal.SIGKILL)
    for process in processes:
        process.join()
    codes = [process.exitcode for process in processes]
    if not killed and codes != [0] * stage.world_size:
        raise SystemExit(f"{stage.name} ended with {codes}:\n{log.read_text(errors='replace')[-3000:]}")
    return not killed


def content(folder: Path) -> dict[str, str]:
    """Path of each file -> digest of what does not depend on clocks. Grids of lost steps are set aside in previous-N, as they say."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    kept = [path for path in paths if not path.relative_to(folder).parts[0].startswith("previous-")]
    return {str(path.relative_to(folder)): _digest(path) for path in kept}


def _digest(path: Path) -> str:
    data = path.read_bytes()
    if path.suffix == ".safetensors":
        tensors = {name: tensor for name, tensor in load(data).items() if name not in SECONDS}
        data = b"".join(name.encode() + tensors[name].numpy().tobytes() for name in sorted(tensors))
    if path.suffix == ".json":
        data = json.dumps(_timeless(json.loads(data))).encode()
    if path.name == "metrics.jsonl":
        data = json.dumps([_timeless(json.loads(line)) for line in data.splitlines()]).encode()
    return hashlib.sha256(data).hexdigest()


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if key not in SECONDS}
    return [_timeless(item) for item in value] if isinstance(value, list) else value


def disturb(
    stage: Stage, folder: Path, before: Path, after: Path, kills: int, seconds: float, chance: random.Random
) -> None:
    """Rounds of one stage until there were so many kills, or for so long."""
    wanted, began, log = content(after), time.monotonic(), folder.parent / f"{stage.name}.log"
    while stage.kills < kills and time.monotonic() < began + seconds:
        shutil.rmtree(folder)
        shutil.copytree(before, folder)
        while not run(stage, log, chance.uniform(0, stage.length) if stage.kills < kills else None):
            stage.kills += 1
            if stage.name == "export" and content(folder) == wanted:
                break  # killed after its last write; a folder that holds a pipeline is refused
        stage.rounds += 1
        found = content(folder)
        stage.different += [name for name in {*wanted, *found} if wanted.get(name) != found.get(name)]
        print(
            f"{stage.name}: {stage.kills} kills, {stage.rounds} rounds, different: {stage.different or 'none'}",
            flush=True,
        )
    stage.seconds = time.monotonic() - began


def stages(folder: Path, settings: Path) -> list[Stage]:
    run = str(folder)
    return [
        Stage("train", ["train", "--config", str(settings)], 2, 40),
        Stage("score", ["score", run], 2, 20),
        Stage("sweep", ["sweep", run, "--evaluation.sweep.stds", "0.06:0.15:3"], 2, 20),
        Stage("export", ["export", run, "power_0_10"], 1, 10),
        Stage("report", ["report", run], 1, 10),
    ]


def measure(base: Path, kills: int, compiled: int, minutes: float, chance: random.Random) -> Iterator[Stage]:
    """Each stage, when it is done."""
    folder, settings = base / "run", base / "settings.yaml"
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(base / "inductor")  # before the server of processes starts
    tree = {**SETTINGS, "output_dir": str(folder), "data": {**SETTINGS["data"], "cache_dir": str(base / "cache")}}
    settings.write_text(json.dumps(tree))
    run(Stage("features", ["features", "--config", str(settings)], 1, 0), base / "features.log")
    every = stages(folder, settings)
    if compiled:
        every.append(Stage("train, compiled", [*every[0].arguments, "--training.compile", "true"], 2, 0))
    first = last = base / "state"
    shutil.copytree(folder, first)
    total = sum(stage.share for stage in every)
    for stage in every:
        if not stage.share:
            last = first
            shutil.rmtree(folder)
            shutil.copytree(first, folder)
        began = time.monotonic()
        run(stage, base / f"{stage.name}.log")
        stage.length = time.monotonic() - began
        after = base / f"state after {stage.name}"
        shutil.copytree(folder, after)
        share = round(kills * stage.share / total) if stage.share else compiled
        disturb(stage, folder, last, after, share, 60 * minutes * (stage.share or total) / total, chance)
        yield stage
        shutil.rmtree(folder)
        shutil.copytree(after, folder)
        last = after


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="of train, score, sweep, export and report together")
    parser.add_argument("--compiled", type=int, default=5, help="of compiled training, beside these")
    parser.add_argument("--minutes", type=float, default=60.0, help="at most, for these; as much again for compiled")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/kills.json"))
    arguments = parser.parse_args()
    CONTEXT.set_forkserver_preload(PRELOAD)
    began, chance, kills, done = time.monotonic(), random.Random(arguments.seed), 0, []
    with tempfile.TemporaryDirectory() as base:
        for stage in measure(Path(base), arguments.kills, arguments.compiled, arguments.minutes, chance):
            kills += stage.kills
            done.append({key: value for key, value in asdict(stage).items() if key != "arguments"})
            machine = {"machine": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
            found = {
                **machine,
                "seed": arguments.seed,
                "kills": kills,
                "seconds": time.monotonic() - began,
                "stages": done,
            }
            arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{'stage':<16} processes  length s  kills  rounds  equal  seconds")
    for s in done:
        figures = f"{s['world_size']:>9}  {s['length']:>8.1f}  {s['kills']:>5}  {s['rounds']:>6}"
        print(f"{s['name']:<16} {figures}  {'no' if s['different'] else 'yes':>5}  {s['seconds']:>7.0f}")
    print(f"{kills} kills in {time.monotonic() - began:.0f} s")
    return int(any(stage["different"] for stage in done))


if __name__ == "__main__":
    sys.exit(main())
