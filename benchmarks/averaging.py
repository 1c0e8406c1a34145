"""Time of one update of K averages: ours, every peer at its fastest setting, and the floor that memory sets.

    python benchmarks/averaging.py [--averages 1 3 8] [--processes 7] [--rounds 9] [--threads 2] [--device cpu] [--output FILE.json]

All contenders follow one model (google/ddpm-cifar10-32, 35.7 M parameters, 328 tensors) and take turns, so that a slow moment of
the machine affects all of them. A process's ratio is the median over the rounds of a contender's time over ours in the same round.
Whether the allocator recycles what a contender allocates per update is fixed by chance when a process starts, and changes its time
several times over. So the figure is the median over several fresh processes, printed with minimum and maximum. Needs the extra
`bench`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel
from ema_pytorch import EMA
from environment import environment, save
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ddpm_ema.averaging import AverageBank, ConstantDecay

Update = Callable[[], None]
DECAYS = [0.999, 0.9999, 0.99, 0.995, 0.9995, 0.9, 0.99995, 0.95]
OURS, SPLIT, BARE, FLOOR = (
    "ddpm_ema",
    "ddpm_ema, one of 2 ranks",
    "bare _foreach_lerp_ per average",
    "flat tensors, in blocks",
)
DIFFUSERS = "diffusers EMAModel (foreach)"

CIFAR10_UNET: dict[str, Any] = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 2,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
}


def ours(model: nn.Module, count: int, rank: int = 0, world_size: int = 1) -> Update:
    profiles = {f"average_{k}": ConstantDecay(DECAYS[k % len(DECAYS)]) for k in range(count)}
    bank = AverageBank(model.named_parameters(), profiles, rank=rank, world_size=world_size)
    return lambda: bank.update((bank.step or 0) + 1)


def bare_foreach(model: nn.Module, count: int) -> Update:
    sources = [parameter.detach() for parameter in model.parameters()]
    averages = [[source.clone() for source in sources] for _ in range(count)]

    def update() -> None:
        for average, decay in zip(averages, DECAYS, strict=False):
            torch._foreach_lerp_(average, sources, 1.0 - decay)

    return update


def floor(model: nn.Module, count: int, block: int = 1 << 20) -> Update:
    """One contiguous parameter, which no real model is: every block of it is read once for all averages."""
    numel = sum(parameter.numel() for parameter in model.parameters())
    device = next(model.parameters()).device
    source = torch.randn(numel, device=device)
    averages = [source.clone().split(block) for _ in range(count)]
    blocks = range(len(averages[0]))
    targets = [average[i] for i in blocks for average in averages]
    sources = [part for part in source.split(block) for _ in averages]
    weights = [1.0 - decay for _ in blocks for decay in DECAYS[:count]]
    return lambda: torch._foreach_lerp_(targets, sources, weights)


def averaged_model(model: nn.Module, count: int) -> Update:
    peers = [AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay)) for decay in DECAYS[:count]]
    return lambda: [peer.update_parameters(model) for peer in peers] and None


def timm_ema(model: nn.Module, count: int) -> Update:
    peers = [ModelEmaV3(model, decay=decay, foreach=True) for decay in DECAYS[:count]]
    return lambda: [peer.update(model) for peer in peers] and None


def ema_pytorch(model: nn.Module, count: int, use_foreach: bool) -> Update:
    settings = {"update_every": 1, "update_after_step": 0, "include_online_model": False, "use_foreach": use_foreach}
    peers = [EMA(model, beta=decay, **settings) for decay in DECAYS[:count]]
    return lambda: [peer.update() for peer in peers] and None


def diffusers_ema(model: nn.Module, count: int, foreach: bool) -> Update:
    peers = [EMAModel(model.parameters(), decay=decay, foreach=foreach) for decay in DECAYS[:count]]
    return lambda: [peer.step(model.parameters()) for peer in peers] and None


def contenders(model: nn.Module, count: int) -> dict[str, Update]:
    return {
        OURS: ours(model, count),
        SPLIT: ours(model, count, rank=0, world_size=2),
        FLOOR: floor(model, count),
        BARE: bare_foreach(model, count),
        "torch AveragedModel": averaged_model(model, count),
        "timm ModelEmaV3 (foreach)": timm_ema(model, count),
        "ema-pytorch EMA (foreach)": ema_pytorch(model, count, use_foreach=True),
        "ema-pytorch EMA": ema_pytorch(model, count, use_foreach=False),
        DIFFUSERS: diffusers_ema(model, count, foreach=True),
        "diffusers EMAModel": diffusers_ema(model, count, foreach=False),
    }


def measure(updates: dict[str, Update], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every update in every round; the order turns from round to round."""

    def timed(update: Update) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        update()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    names = list(updates)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 2):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            seconds = timed(updates[name])
            if number >= 2:  # the first two warm up
                times[name].append(seconds)
    return times


def one_process(count: int, rounds: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Each contender's median and fastest milliseconds, and its median ratio to ours, as this process has them."""
    torch.manual_seed(0)
    times = measure(contenders(UNet2DModel(**CIFAR10_UNET).to(device), count), rounds, device)
    return {
        name: {
            "median_ms": statistics.median(seconds) * 1e3,
            "fastest_ms": min(seconds) * 1e3,
            "times_ours": statistics.median(t / o for t, o in zip(seconds, times[OURS], strict=True)),
        }
        for name, seconds in times.items()
    }


def fresh_process(count: int, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """`one_process` in a new interpreter."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        options = ("rounds", "threads", "device")
        command = [sys.executable, __file__, "--one", "--averages", str(count), "--output", file.name]
        command += [word for option in options for word in (f"--{option}", str(getattr(arguments, option)))]
        subprocess.run(command, check=True)
        found: dict[str, dict[str, float]] = json.loads(Path(file.name).read_text())
    return found


def summarise(processes: list[dict[str, dict[str, float]]]) -> list[dict[str, Any]]:
    rows = []
    for name in processes[0]:
        ratios = sorted(process[name]["times_ours"] for process in processes)
        rows.append(
            {
                "contender": name,
                "median_ms": statistics.median(process[name]["median_ms"] for process in processes),
                "fastest_ms": min(process[name]["fastest_ms"] for process in processes),
                "times_ours": statistics.median(ratios),
                "times_ours_in_each_process": ratios,
            }
        )
    return rows


def targets(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What the library promises at K = 3 on the CPU, and what was measured."""
    against = {row["contender"]: row["times_ours"] for row in rows}
    peers = {name: ratio for name, ratio in against.items() if name not in (OURS, SPLIT, BARE, FLOOR)}
    quickest = min(peers, key=lambda name: peers[name])
    return {
        f"quickest peer ({quickest}) / ours >= 1": {"measured": peers[quickest], "met": peers[quickest] >= 1.0},
        "diffusers foreach / ours >= 3.5": {"measured": against[DIFFUSERS], "met": against[DIFFUSERS] >= 3.5},
        "ours / bare foreach <= 1.2": {"measured": 1 / against[BARE], "met": 1 / against[BARE] <= 1.2},
        "one of 2 ranks / ours <= 0.55": {"measured": against[SPLIT], "met": against[SPLIT] <= 0.55},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--averages", type=int, nargs="+", default=[1, 3, 8], help="numbers of averages")
    parser.add_argument(
        "--processes", type=int, default=None, help="fresh ones that measure (7; on CUDA, which recycles all, 3)"
    )
    parser.add_argument(
        "--rounds", type=int, default=9, help="times that every contender takes its turn in each of them"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "averaging.json")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not 1 <= min(arguments.averages) <= max(arguments.averages) <= len(DECAYS):
        parser.error(f"--averages: 1 to {len(DECAYS)}")
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    processes = arguments.processes or (7 if device.type == "cpu" else 3)
    if arguments.one:
        arguments.output.write_text(json.dumps(one_process(arguments.averages[0], arguments.rounds, device)))
        return
    numel = sum(parameter.numel() for parameter in UNet2DModel(**CIFAR10_UNET).parameters())
    counts = {"processes": processes, "rounds": arguments.rounds}
    here = {**environment("numpy", "diffusers", "timm", "ema-pytorch"), "device": device.type}
    report: dict[str, Any] = {"environment": here, "parameters": numel, **counts, "averages": {}}
    for count in arguments.averages:
        rows = summarise([fresh_process(count, arguments) for _ in range(processes)])
        report["averages"][str(count)] = {"rows": rows} | ({"targets": targets(rows)} if count == 3 else {})
        show(count, numel, report)
    save(arguments.output, report)
    print(f"\nwritten to {arguments.output}")


def show(count: int, numel: int, report: dict[str, Any]) -> None:
    counts = f"{report['processes']} processes, {report['rounds']} rounds each"
    print(f"\nK = {count} averages of {numel / 1e6:.1f} M parameters, {counts}, {report['environment']['device']}")
    found = report["averages"][str(count)]
    for row in sorted(found["rows"], key=lambda row: row["times_ours"]):
        ratios = row["times_ours_in_each_process"]
        ratio = f"{row['times_ours']:6.2f} x ours ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"  {row['contender']:28s} {row['median_ms']:9.2f} ms  {ratio}")
    for target, result in found.get("targets", {}).items():
        print(f"  {'met ' if result['met'] else 'MISSED'}  {target}: {result['measured']:.2f}")


if __name__ == "__main__":
    main()
