"""SIGKILL at random moments of every stage; each time the end must be that of a run that nobody disturbed, bit for bit.

    python benchmarks/kills.py [--kills 100] [--compiled 12] [--minutes 60] [--seed 0] [--output benchmarks/results/kills.json]

A tiny run of handwritten digits is trained, scored, swept, reconstructed from, exported and reported on once, undisturbed. Then each
stage is started on what it started from, all its processes are killed at a moment that is uniform over its undisturbed length, and
it is started again, until it ends by itself: a round. A kill counts if a process was alive. After each round every file must be
there and equal (but for the seconds that some hold), and no other: what a kill left must be gone. Training, score and sweep run on
two processes.

Compiled training is two stages. In one each round begins with an empty cache of torch.compile, so that kills hit the compiler; every
second one waits for a library that the linker has not finished, and leaves it torn. In the other the cache is full, so that
kills hit the steps. Compilers are killed with the processes that started them, as a scheduler would.

Prints a table and writes JSON, in place of what the file held of the same stages; ends with 1 if a round did not end equal.
`--kills 0`, `--compiled 0` and `--only NAME` leave stages undisturbed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from environment import environment, save
from safetensors.torch import load
from torch import Tensor, nn

from ddpm_ema.compiling import _is_whole

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


class Tiny(nn.Module):
    """Two convolutions: x_t `[n, C, H, W]`, timesteps int64 `[n]` -> `[n, outputs, H, W]`."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels + 1, 8, 3, padding=1)
        self.last = nn.Conv2d(8, outputs, 3, padding=1)

    def forward(self, x_t: Tensor, timesteps: Tensor, labels: Tensor | None) -> Tensor:
        time = (timesteps / 100)[:, None, None, None].expand_as(x_t[:, :1])
        return self.last(nn.functional.silu(self.first(torch.cat([x_t, time], dim=1))))


def tiny(image_size: int, channels: int, out_channels: int, num_classes: int | None) -> nn.Module:
    """What `model.factory` calls."""
    return Tiny(channels, out_channels)


@dataclass
class Stage:
    """One command, and what happened to it. `share` is its part of the kills in percent, 0 for compiled training."""

    name: str
    arguments: list[str]
    world_size: int
    share: int
    cache: str | None = None
    cold: bool = False
    length: float = 0.0
    kills: int = 0
    torn: int = 0
    rounds: int = 0
    different: list[str] = field(default_factory=list)
    seconds: float = 0.0


def start(stage: Stage, log: Path) -> list[Any]:
    """The command of a stage on its processes, each as a launcher would start it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes, world_size = [], stage.world_size
    for rank in range(world_size):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        given = {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        given = (given if world_size > 1 else {}) | ({"TORCHINDUCTOR_CACHE_DIR": stage.cache} if stage.cache else {})
        processes.append(CONTEXT.Process(target=_work, args=(stage.arguments, given, str(log))))
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


def run(stage: Stage, log: Path, seconds: float | None = None, tear: bool = False) -> bool:
    """Runs a stage, and kills it after so many seconds, or later at a torn library; whether it ended by itself."""
    processes = start(stage, log)
    deadline = time.monotonic() + (seconds if seconds is not None else 3600)
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    while tear and any(process.is_alive() for process in processes) and not torn(stage):
        time.sleep(0.001)
    killed = [process for process in processes if process.is_alive()]
    for process in killed:
        _kill(process.pid)
    for process in processes:
        process.join()
    codes = [process.exitcode for process in processes]
    if not killed and codes != [0] * stage.world_size:
        raise SystemExit(f"{stage.name} ended with {codes}:\n{log.read_text(errors='replace')[-3000:]}")
    return not killed


def _kill(pid: int) -> None:
    """The linker first, because it may be at work on what is to be torn."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for each in [*reversed(process.children(recursive=True)), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()


def torn(stage: Stage) -> bool:
    """Whether a library in the stage's cache of torch.compile is not whole."""
    for path in Path(stage.cache or "").rglob("*.so"):
        with contextlib.suppress(FileNotFoundError):
            if not _is_whole(path):
                return True
    return False


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
        if stage.cold:
            stage.cache = tempfile.mkdtemp(dir=folder.parent)
        started, kills_before = time.monotonic(), stage.kills
        while not run(
            stage,
            log,
            chance.uniform(0, stage.length) if stage.kills < kills else None,
            tear=stage.cold and stage.kills % 2 == 1 and stage.kills < kills,
        ):
            stage.kills += 1
            stage.torn += stage.cold and torn(stage)
            if stage.name == "export" and content(folder) == wanted:
                break  # killed after its last write; a folder that holds a pipeline is refused
        if stage.kills == kills_before:
            stage.length = time.monotonic() - started  # the machine was busier when it was measured
        stage.rounds += 1
        found = content(folder)
        stage.different += [name for name in {*wanted, *found} if wanted.get(name) != found.get(name)]
        print(
            f"{stage.name}: {stage.kills} kills, {stage.rounds} rounds, different: {stage.different or 'none'}",
            flush=True,
        )
    stage.seconds = time.monotonic() - began


def stages(folder: Path, settings: Path) -> list[Stage]:
    run, train = str(folder), ["train", "--config", str(settings)]
    targets = [word for name in ("power_0_06", "power_0_12", "bias_corrected_0_9") for word in ("--target", name)]
    return [
        Stage("train", train, 2, 30),
        Stage("score", ["score", run], 2, 15),
        Stage("sweep", ["sweep", run, "--evaluation.sweep.stds", "0.06:0.15:3"], 2, 15),
        Stage("reconstruct", ["reconstruct", run, *targets], 1, 15),
        Stage("export", ["export", run, "power_0_10"], 1, 12),
        Stage("report", ["report", run], 1, 13),
    ]


def compiled(settings: Path, cache: Path) -> list[Stage]:
    """Of `tiny`, because compiling a U-Net takes minutes where cores are busy. The first stage's undisturbed run fills the cache."""
    short = ["--training.steps", "20", "--training.sample_every", "0"]
    small = ["--training.compile", "true", "--model.factory", "benchmarks.kills:tiny", *short]
    train = ["train", "--config", str(settings), *small]
    return [
        Stage("train, compiled, cold", train, 2, 0, str(cache), cold=True),
        Stage("train, compiled, warm", train, 2, 0, str(cache)),
    ]


def measure(arguments: argparse.Namespace, base: Path, chance: random.Random) -> Iterator[Stage]:
    """Each stage, when it is done: compiled training first, then the others, each on what the one before it left."""
    kills, extra, minutes = arguments.kills, arguments.compiled, arguments.minutes
    folder, settings = base / "run", base / "settings.yaml"
    tree = {**SETTINGS, "output_dir": str(folder), "data": {**SETTINGS["data"], "cache_dir": str(base / "cache")}}
    settings.write_text(json.dumps(tree))
    run(Stage("features", ["features", "--config", str(settings)], 1, 0), base / "features.log")
    first = last = base / "state"
    shutil.copytree(folder, first)
    every = compiled(settings, base / "inductor") * bool(extra) + stages(folder, settings) * bool(kills)
    for stage in every:
        began = time.monotonic()
        run(stage, base / f"{stage.name}.log")
        stage.length = time.monotonic() - began
        after = base / f"state after {stage.name}"
        shutil.copytree(folder, after)
        if not arguments.only or stage.name in arguments.only:
            part, wanted = (stage.share / 100, kills) if stage.share else (1 / 3 if stage.cold else 2 / 3, extra)
            disturb(stage, folder, last, after, round(wanted * part), 60 * minutes * part, chance)
            yield stage
        last = after if stage.share else first
        shutil.rmtree(folder)
        shutil.copytree(last, folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="of the stages but compiled training")
    parser.add_argument("--compiled", type=int, default=12, help="of compiled training, beside these")
    parser.add_argument("--minutes", type=float, default=60.0, help="at most, for these; as much again for compiled")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="of the stages to kill (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/kills.json"))
    arguments = parser.parse_args()
    CONTEXT.set_forkserver_preload(PRELOAD)
    began, chance, kills = time.monotonic(), random.Random(arguments.seed), 0
    here = {"environment": environment(), "seed": arguments.seed}
    before = json.loads(arguments.output.read_text())["stages"] if arguments.output.exists() else []
    done: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as base:
        for stage in measure(arguments, Path(base), chance):
            done.append({key: value for key, value in asdict(stage).items() if key not in ("arguments", "cache")})
            done[-1] |= here
            every = [one for one in before if one["name"] not in {own["name"] for own in done}] + done
            kills = sum(one["kills"] for one in every)
            save(arguments.output, {"kills": kills, "stages": every})
    print(f"{'stage':<21} processes  length s  kills  torn  rounds  equal  seconds")
    for s in done:
        figures = f"{s['world_size']:>9}  {s['length']:>8.1f}  {s['kills']:>5}  {s['torn']:>4}  {s['rounds']:>6}"
        print(f"{s['name']:<21} {figures}  {'no' if s['different'] else 'yes':>5}  {s['seconds']:>7.0f}")
    print(f"{kills} kills in {time.monotonic() - began:.0f} s")
    return int(any(stage["different"] for stage in done))


if __name__ == "__main__":
    sys.exit(main())
