"""One rank of a split bank in a process of its own: `python split_worker.py RANK PORT FOLDER`. Imports as little as it can."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from ddpm_ema.averaging import AverageBank, BiasCorrected, ConstantDecay, HardCopy, PowerFunction

PROFILES = {"ema": ConstantDecay(0.9), "d": BiasCorrected(0.99), "p": PowerFunction(0.1), "h": HardCopy(3)}
WORLD_SIZE = 3


def model() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.Linear(5, 7), nn.Linear(7, 5))
    net.add_module("tied", nn.Linear(7, 5))
    net.tied.weight = net[4].weight
    return net


def move(net: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))


def bank_of(net: nn.Module, rank: int = 0, world_size: int = 1) -> AverageBank:
    return AverageBank(net, PROFILES, rank=rank, world_size=world_size)


def main(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD_SIZE)
    net = model()
    bank = bank_of(net, rank, WORLD_SIZE)
    for step in range(1, 8):
        move(net, step)
        bank.update(step)
    results = {
        "to_0": list(bank.gather("ema")),
        "to_2": list(bank.gather("p", dst=2)),
        "all": bank.gather_all("d"),
    }
    # A group of its own, in another order of ranks than the world's.
    group = dist.new_group([1, 2])
    if rank in (1, 2):
        pair = bank_of(net, rank - 1, 2)
        results["pair"] = list(pair.gather("ema", dst=1, group=group))
        results["pair_all"] = pair.gather_all("ema", group=group)
        try:
            pair.gather("ema")
        except ValueError as error:
            results["error"] = str(error)
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
