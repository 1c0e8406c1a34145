"""Time and memory of an update on sharded parameters (`fully_shard`): the bank, and the usual ways to write it by hand.

    python benchmarks/averaging_shards.py [--averages 1 3] [--processes 2] [--rounds 15] [--output FILE.json]

One model (google/ddpm-cifar10-32, 35.7 M parameters), sharded over gloo processes of one thread. The contenders take turns; a ratio is
the median over the rounds of a contender's time over the bank's in the same round, on the slowest process. By hand means: DTensors,
updated one by one; or whole parameters, gathered for every update and averaged on every process. torch's `AveragedModel` refuses a
sharded model, so it follows the unsharded one. The load of the machine is recorded. Needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from diffusers import UNet2DModel
from environment import environment, save
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ddpm_ema.averaging import AverageBank, ConstantDecay

DECAYS = [0.999, 0.9999, 0.99, 0.995]
OURS = "ddpm_ema, shards"
CIFAR10_UNET: dict[str, Any] = {
    "sample_size": 32,
    "layers_per_block": 2,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
Contender = tuple[Callable[[], Any], Callable[[], int]]
"""An update, and the bytes of averages that this process holds."""


def bank(model: nn.Module, count: int) -> Contender:
    found = AverageBank(model, {f"average_{k}": ConstantDecay(DECAYS[k]) for k in range(count)})
    return lambda: found.update((found.step or 0) + 1), lambda: found.num_bytes


def dtensors_one_by_one(model: nn.Module, count: int) -> Contender:
    shadows = [{n: p.detach().clone() for n, p in model.named_parameters()} for _ in range(count)]

    @torch.no_grad()
    def update() -> None:
        for shadow, decay in zip(shadows, DECAYS, strict=False):
            for name, parameter in model.named_parameters():
                shadow[name].mul_(decay).add_(parameter, alpha=1 - decay)

    return update, lambda: sum(t.to_local().nbytes for shadow in shadows for t in shadow.values())


def whole_parameters(model: nn.Module, count: int) -> Contender:
    shadows = [{n: p.detach().full_tensor().clone() for n, p in model.named_parameters()} for _ in range(count)]

    @torch.no_grad()
    def update() -> None:
        for name, parameter in model.named_parameters():
            whole = parameter.full_tensor()
            for shadow, decay in zip(shadows, DECAYS, strict=False):
                shadow[name].lerp_(whole, 1 - decay)

    return update, lambda: sum(t.nbytes for shadow in shadows for t in shadow.values())


def averaged_model(model: nn.Module, count: int) -> Contender:
    peers = [AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay)) for decay in DECAYS[:count]]
    return (
        lambda: [peer.update_parameters(model) for peer in peers],
        lambda: sum(p.nbytes for peer in peers for p in peer.module.parameters()),
    )


def process(rank: int, arguments: argparse.Namespace, count: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=arguments.processes)
    torch.manual_seed(0)
    plain, model = UNet2DModel(**CIFAR10_UNET), fully_shard(UNet2DModel(**CIFAR10_UNET))
    contenders = {
        OURS: bank(model, count),
        "by hand: DTensors one by one": dtensors_one_by_one(model, count),
        "by hand: whole parameters": whole_parameters(model, count),
        "torch AveragedModel, unsharded": averaged_model(plain, count),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(arguments.rounds + 2):
        names = list(contenders)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            dist.barrier()
            start = time.perf_counter()
            contenders[name][0]()
            slowest = torch.tensor(time.perf_counter() - start)
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
            if number >= 2:  # the first two warm up
                seconds[name].append(slowest.item())
    if rank == 0:
        rows = {
            name: {
                "median_ms": statistics.median(times) * 1e3,
                "times_ours": statistics.median(t / o for t, o in zip(times, seconds[OURS], strict=True)),
                "quartiles_of_times_ours": statistics.quantiles(
                    [t / o for t, o in zip(times, seconds[OURS], strict=True)], n=4
                )[::2],
                "bytes_per_process": contenders[name][1](),
            }
            for name, times in seconds.items()
        }
        Path(store + ".json").write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--averages", type=int, nargs="+", default=[1, 3], help="numbers of averages, up to 4")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15, help="times that every contender takes its turn")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "averaging_shards.json")
    arguments = parser.parse_args()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    sizes = {"processes": arguments.processes, "rounds": arguments.rounds}
    torch.set_num_threads(1)  # as in each of the processes: the page tells of it
    report: dict[str, Any] = {"environment": environment("diffusers"), **sizes, "averages": {}}
    for count in arguments.averages:
        store = str(arguments.output.absolute()) + f".{os.getpid()}.{count}"
        torch.multiprocessing.spawn(process, (arguments, count, store), nprocs=arguments.processes)
        result = Path(store + ".json")
        report["averages"][str(count)] = rows = json.loads(result.read_text())
        result.unlink()
        Path(store).unlink(missing_ok=True)
        print(f"\nK = {count} averages, {arguments.processes} processes")
        for name, row in rows.items():
            low, high = row["quartiles_of_times_ours"]
            megabytes = row["bytes_per_process"] / 1e6
            ratio = f"{row['times_ours']:6.2f} x ours ({low:.2f} to {high:.2f})"
            print(f"  {name:32s} {row['median_ms']:8.1f} ms  {ratio}  {megabytes:7.1f} MB")
    save(arguments.output, report)
    print(f"\nwritten to {arguments.output}")


if __name__ == "__main__":
    main()
