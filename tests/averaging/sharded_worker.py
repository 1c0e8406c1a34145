"""One process of a bank over shards: `python sharded_worker.py RANK PORT FOLDER WORLD_SIZE SCENARIO...`.

Each scenario compares with the bank of an unsharded model in the same process. What went wrong is written to FOLDER/RANK.json.
"""

import json
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from ddpm_ema.averaging import (
    PROFILES,
    AverageBank,
    BiasCorrected,
    ConstantDecay,
    Delayed,
    HardCopy,
    PowerFunction,
    Uniform,
    find_snapshots,
    profile_from_dict,
    reconstruct,
    write_snapshot,
)

SOME = {"ema": ConstantDecay(0.9), "d": BiasCorrected(0.99), "p": PowerFunction(0.1), "u": Uniform(), "h": HardCopy(3)}
REQUIRED = {"decay": 0.97, "std": 0.1, "every": 3, "start": 4, "half_life": 5.0, "length": 6, "end": 14}
STEPS = 7


def net(seed: int = 0) -> nn.Module:
    """Rows of 5, 7 and 1: shards of 2 and 3 processes are uneven, and some are empty."""
    torch.manual_seed(seed)
    tied = nn.Linear(7, 7)
    module = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 7), tied, nn.Linear(7, 7), nn.Linear(7, 1))
    module[4].weight = tied.weight
    return module


def every_profile() -> dict:
    found = {"late": Delayed(PowerFunction(0.05), 4)}
    for kind, rule in PROFILES.items():
        names = {name.removesuffix("_per_step") for name in rule.__dataclass_fields__} & REQUIRED.keys()
        found[kind] = profile_from_dict({"kind": kind, **{name: REQUIRED[name] for name in names}})
    return found


def shard(module: nn.Module) -> nn.Module:
    for part in (module[2], module):
        fully_shard(part)
    return module


def place(module: nn.Module) -> nn.Module:
    """DTensors without FSDP: replicated over one dimension of a mesh, sharded or replicated over the other."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(), 1))
    placed: dict[nn.Parameter, nn.Parameter] = {}  # a tied parameter stays one
    for part in module.modules():
        for name, parameter in part._parameters.items():
            kinds = [Replicate(), Shard(0)] if len(placed) % 2 else [Shard(parameter.ndim - 1), Replicate()]
            if parameter not in placed:
                placed[parameter] = nn.Parameter(distribute_tensor(parameter.detach(), mesh, kinds))
            part._parameters[name] = placed[parameter]
    return module


def move(whole: nn.Module, step: int, parts: nn.Module | None = None) -> None:
    """Give a module its next parameters, and the same to its sharded twin."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for one in whole.parameters():
            one.add_(torch.randn(one.shape, generator=generator))
        for one, part in zip(whole.parameters(), parts.parameters(), strict=True) if parts else ():
            part.copy_(distribute_tensor(one.detach(), part.device_mesh, part.placements))
        for module in (whole, parts) if parts else (whole,):
            module[1].running_mean.add_(1.0)


def trained(
    split=shard, profiles=SOME, steps: int = STEPS, every: int = 1
) -> tuple[AverageBank, AverageBank, nn.Module]:
    whole, parts = net(), split(net())
    banks = [AverageBank(module, profiles) for module in (whole, parts)]
    for step in range(every, every * steps + 1, every):
        move(whole, step, parts)
        banks[0].update(step, every)
        with CommDebugMode() as sent:
            banks[1].update(step, every)
        assert sent.get_total_counts() == 0
    return *banks, parts


def same(a: dict, b: dict) -> None:
    assert list(a) == list(b)
    for name in a:
        assert torch.equal(a[name], b[name]), name


def gather_gives_the_unsharded_averages(split=shard, profiles=SOME, every: int = 1) -> None:
    whole, parts, _ = trained(split, profiles, every=every)
    for name in profiles:
        same(parts.gather_all(name), whole.weights(name))
        same(parts.buffers(name), whole.buffers(name))
        last = dist.get_world_size() - 1
        collected = dict(parts.gather(name, dst=last))
        same(collected, whole.weights(name) if dist.get_rank() == last else {})
        assert all(type(tensor) is torch.Tensor for tensor in collected.values())


def placements_on_a_mesh_of_two_dimensions() -> None:
    gather_gives_the_unsharded_averages(place)


def every_profile_is_equal() -> None:
    gather_gives_the_unsharded_averages(profiles=every_profile(), every=2)
    gather_gives_the_unsharded_averages(place, profiles=every_profile())


def memory_and_distances_are_of_the_own_shards() -> None:
    for split in (shard, place):
        whole, parts, module = trained(split)
        move(net(), 99, module)
        copied = parts.weights("ema")
        held = sum(t.to_local().nbytes for t in {id(t): t for t in copied.values()}.values())
        assert parts.num_bytes == len(SOME) * (held + sum(b.nbytes for b in parts.buffers("ema").values()))
        raw = {n: p.detach().full_tensor() for n, p in module.named_parameters()}
        sums = torch.stack([*parts.squared_distances().values(), parts.squared_norm()])
        dist.all_reduce(sums)
        wanted = [
            sum((a - raw[n]).double().square().sum() for n, a in whole.weights(k).items() if n in raw) for k in SOME
        ]
        wanted.append(sum(p.double().square().sum() for p in raw.values()))
        torch.testing.assert_close(sums, torch.stack(wanted), rtol=1e-5, atol=0)


def copies_go_into_any_module() -> None:
    whole, parts, _ = trained()
    plain, alike = net(1), shard(net(1))
    parts.copy_to("p", plain)
    alike.eval()(torch.ones(2, 6))  # FSDP now shows whole copies of the root's parameters
    with CommDebugMode() as sent:
        parts.copy_to("p", alike)
    assert sent.get_total_counts() == 0
    alike_values = {n: p.full_tensor() for n, p in alike.named_parameters(remove_duplicate=False)}
    for values in (dict(plain.named_parameters(remove_duplicate=False)), alike_values):
        same({n: v.detach() for n, v in values.items()}, whole.weights("p"))
    assert torch.equal(alike[1].running_mean, whole.buffers("p")["1.running_mean"])
    torch.testing.assert_close(alike(torch.ones(2, 6)), plain.eval()(torch.ones(2, 6)))
    backwards = shard(net(1))
    whole.copy_to("p", backwards)  # and from an unsharded bank into a sharded module
    same({n: p.full_tensor() for n, p in backwards.named_parameters(remove_duplicate=False)}, whole.weights("p"))


def whole_tensors_and_shards_are_loaded() -> None:
    whole, parts, module = trained()
    fresh = AverageBank(module, SOME)
    with CommDebugMode() as sent:
        fresh.load_weights("p", whole.weights("p"))
        fresh.load_weights("u", parts.weights("u"))
    assert sent.get_total_counts() == 0
    for name in ("p", "u"):
        same(fresh.gather_all(name), whole.weights(name))
    fresh.load_state_dict(whole.state_dict())
    assert fresh.step == STEPS
    same(fresh.gather_all("d"), whole.weights("d"))
    back = AverageBank(net(1), SOME)
    back.load_state_dict(parts.state_dict())
    same(back.weights("h"), whole.weights("h"))


def a_snapshot_is_written_once_and_reconstructs(folder: Path) -> None:
    whole, parts, _ = trained()
    written = write_snapshot(folder / "step-00000007" / "p.safetensors", parts.weights("p"), STEPS, SOME["p"])
    dist.barrier()
    assert find_snapshots(folder) == [written]
    same(dict(written.tensors(list(whole.weights("p")))), whole.weights("p"))
    same(reconstruct([written], STEPS, SOME["p"], check=False).weights, dict(written.tensors(list(written.shapes()))))


def training_is_followed() -> None:
    module = shard(net())
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    bank = AverageBank(module, SOME)
    handle = bank.attach(optimizer)
    plain = net()
    whole = AverageBank(plain, SOME)
    for step in range(1, 5):
        module.eval()(torch.ones(2, 6))  # a preview between two steps
        module.train()(torch.randn(8, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for one, part in zip(plain.parameters(), module.parameters(), strict=True):
                one.copy_(part.full_tensor())
        whole.update(step)
    assert handle.step == 4
    handle.remove()
    module.eval()(torch.ones(2, 6))  # FSDP now shows whole copies of the root's parameters, which replace nothing
    for followed in (bank, whole):
        followed.update(5)
    for name in SOME:
        same(bank.gather_all(name), whole.weights(name))


def a_state_is_stored(folder: Path) -> None:
    dcp.save(trained()[1].state_dict(), checkpoint_id=folder / "stored")


def a_state_stored_on_two_processes_is_loaded(folder: Path) -> None:
    whole, _, _ = trained()
    bank = AverageBank(shard(net(5)), SOME)
    state = bank.state_dict()
    dcp.load(state, checkpoint_id=folder / "stored")
    bank.load_state_dict(state)
    assert bank.step == STEPS
    for name in SOME:
        same(bank.gather_all(name), whole.weights(name))
        same(bank.buffers(name), whole.buffers(name))


def main(rank: int, port: int, folder: Path, world_size: int, scenarios: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    failed = {}
    for scenario in scenarios:
        function = globals()[scenario]
        try:
            function(*[folder for name in ("folder",) if name in function.__annotations__])
            failed[scenario] = ""
        except Exception:
            failed[scenario] = traceback.format_exc()
    (folder / f"{rank}.json").write_text(json.dumps(failed))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), sys.argv[5:])
