"""What a run costs on n processes: memory, bytes over the network and seconds, held against the formulas of docs/cluster.md.

    python benchmarks/cluster.py [--processes 1 2 4] [--steps 6] [--output benchmarks/results/cluster.json]

Every launch runs in a network namespace of its own, whose loopback interface carries nothing but this run: its counters are
the bytes sent. (That needs root; without, bytes are not measured.) Memory and bytes must agree with the formulas, or this
ends with 1. Seconds are printed beside what the formula makes of the parts measured in the same launch; several processes
on fewer cores share them, and on a busy machine only the order of magnitude means anything.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from environment import environment, save

BATCH = 16
AVERAGES = {
    "ema_0_999": {"kind": "constant", "decay": 0.999},
    "ema_0_9999": {"kind": "constant", "decay": 0.9999},
    "power_0_05": {"kind": "power_function", "std": 0.05},
    "power_0_10": {"kind": "power_function", "std": 0.10},
}


def settings(folder: Path, steps: int) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "data": {"source": "digits", "image_size": 16, "channels": 3},
        "model": {  # 9.0 M parameters
            "block_out_channels": [64, 128, 128, 128],
            "attention": [False, True, False, False],
            "layers_per_block": 2,
        },
        "training": {"batch_size": BATCH, "steps": steps, "log_every": 10**6},
        "machine": {"device": "cpu"},
        "averages": AVERAGES,
        "checkpoints": {"every": 10**6},
    }


# One launch, measured from inside by every rank


def sent() -> int:
    """Bytes that left over loopback in this network namespace so far."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[8])
    return 0


def work(folder: Path, steps: int) -> None:
    """What one rank measures; rank 0 writes what all of them found to `folder`/measured.json."""
    from ddpm_ema import config
    from ddpm_ema.distributed import Processes
    from ddpm_ema.rundir import RunDir
    from ddpm_ema.train import checkpointing, loop, resume, step, trainer

    processes = Processes.start("cpu")
    run = trainer.build(config.validate(settings(folder / "run", 10**6)), processes, RunDir(folder / "run"))
    resume.restore(run, None)
    gradients: list[int] = []
    parameters = list(run.network.parameters())
    run.optimizer.register_step_pre_hook(
        lambda *_: gradients.append(sum(p.grad.nbytes for p in parameters if p.grad is not None))
    )
    batches = loop.batches_of(run)

    def measure(action: Callable[[], object], times: int = 1) -> dict[str, float]:
        """Median seconds of an action, and bytes that it sent over all ranks together, each time."""
        processes.gather(None)
        before, seconds = sent(), []
        for _ in range(times):
            start = time.perf_counter()
            action()
            seconds.append(time.perf_counter() - start)
        processes.gather(None)
        return {"seconds": statistics.median(seconds), "bytes": (sent() - before) / times}

    step.train_step(run, next(batches))  # the first allocates, and DDP orders its buckets anew
    step.train_step(run, next(batches))
    found: dict[str, Any] = {"step": measure(lambda: step.train_step(run, next(batches)), steps)}

    def average() -> None:
        run.step += 1
        run.bank.update(run.step)

    found["update"] = measure(average, steps)
    if processes.world_size > 1:
        flat = torch.zeros(sum(p.numel() for p in parameters))
        found["all_reduce"] = measure(lambda: dist.all_reduce(flat), steps)
    run.saved_step = -1
    found["save"] = measure(lambda: (checkpointing.save(run), checkpointing.finish_saving(run)))
    manifest = processes.broadcast(run.rundir.checkpoints()[-1].manifest if processes.is_main else None)
    found["restore"] = measure(lambda: resume.restore(run, manifest))
    found["memory"] = {
        "weights": sum(p.nbytes for p in parameters),
        "gradients": gradients[-1],
        "optimizer": sum(t.nbytes for s in run.optimizer.state.values() for t in s.values() if t.numel() > 1),
        "averages": run.bank.num_bytes,
    }
    found["largest_tensor"] = max(p.nbytes for p in parameters)
    everyone = processes.gather(found)
    if processes.is_main:
        (folder / "measured.json").write_text(json.dumps(everyone))
    run.writer.close()
    processes.close()


# The launches, from outside


def launch(processes: int, steps: int, alone: bool) -> list[dict[str, Any]]:
    """What every rank of a launch found."""
    with tempfile.TemporaryDirectory() as folder:
        inside = [sys.executable, str(Path(__file__).resolve()), "--work", folder, "--steps", str(steps)]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [*torchrun, *inside[1:]]
        if alone:
            command = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *command]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{processes} processes: {done.stderr[-3000:]}")
        measured: list[dict[str, Any]] = json.loads(Path(folder, "measured.json").read_text())
        return measured


def formulas(parameters: int, copies: int, n: int) -> dict[str, float]:
    """docs/cluster.md: bytes on one process, and bytes sent by all processes together."""
    model = 4 * parameters
    return {
        "memory": (4 + copies / n) * model,
        "step": 2 * (n - 1) * model,
        "save": copies * model * (n - 1) / n,
        "restore": (3 + copies) * model * (n - 1),
    }


def compare(n: int, ranks: list[dict[str, Any]], one: dict[str, Any], bytes_known: bool) -> list[dict[str, Any]]:
    """Rows of the table: what, measured, by the formula, and whether the two must agree."""
    first = ranks[0]
    parameters = first["memory"]["weights"] // 4
    wanted = formulas(parameters, len(AVERAGES), n)
    memory = max(sum(rank["memory"].values()) for rank in ranks)
    # Whole tensors are shared out: one process may have the largest one more than its share of each copy.
    slack = 1 + len(AVERAGES) * first["largest_tensor"] / wanted["memory"] if n > 1 else 1.001
    rows = [{"what": "bytes of state a process", "measured": memory, "formula": wanted["memory"], "slack": slack}]
    if bytes_known and n > 1:
        rows += [
            {"what": f"bytes sent, {name}", "measured": first[name]["bytes"], "formula": wanted[name], "slack": 1.05}
            for name in ("step", "save", "restore")
        ]
    cores = len(os.sched_getaffinity(0))
    compute = (one["step"]["seconds"] - one["update"]["seconds"]) * max(1 / n, 1 / cores)
    update = one["update"]["seconds"] * max(1 / n, 1 / cores)
    parts = compute + first.get("all_reduce", {"seconds": 0.0})["seconds"] + update
    rows.append({"what": "seconds a step", "measured": first["step"]["seconds"], "formula": parts, "slack": None})
    own = max(rank["update"]["seconds"] for rank in ranks)
    rows.append({"what": "seconds of averaging a step", "measured": own, "formula": update, "slack": None})
    return [{"processes": n, **row} for row in rows]


def bandwidths(ranks: list[dict[str, Any]]) -> dict[str, float]:
    """Bytes a second: of the averaging pass (reads average and parameter, writes average) and of the gradients' sum."""
    first = ranks[0]
    averaging = first["memory"]["averages"] * 3 / first["update"]["seconds"]
    model = first["memory"]["weights"]
    found = {"averaging": averaging}
    if "all_reduce" in first:
        n = len(ranks)
        found["all_reduce"] = 2 * (n - 1) / n * model / first["all_reduce"]["seconds"]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=6, help="measured steps of each launch")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/cluster.json"))
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work, options.steps)
        return 0
    alone = os.geteuid() == 0 and shutil.which("ip") is not None and shutil.which("unshare") is not None
    if not alone:
        print("bytes sent are not measured: a network namespace needs root, iproute2 and util-linux")
    here = environment()
    launches = {n: launch(n, options.steps, alone) for n in sorted({1, *options.processes})}
    rows = [row for n, ranks in launches.items() for row in compare(n, ranks, launches[1][0], alone)]
    print(f"{'processes':>9}  {'what':<28}{'measured':>16}{'formula':>16}{'ratio':>8}")
    wrong = 0
    for row in rows:
        ratio = row["measured"] / row["formula"]
        bad = row["slack"] is not None and not 1 / row["slack"] <= ratio <= row["slack"]
        wrong += bad
        digits = 3 if row["what"].startswith("seconds") else 0
        numbers = f"{row['measured']:>16,.{digits}f}{row['formula']:>16,.{digits}f}{ratio:>8.2f}"
        print(f"{row['processes']:>9}  {row['what']:<28}{numbers}{'  differs' if bad else ''}")
    rates = {n: bandwidths(ranks) for n, ranks in launches.items()}
    for n, found in rates.items():
        print(f"{n:>9}  " + ", ".join(f"{name} at {rate / 1e9:.2f} GB/s" for name, rate in found.items()))
    save(options.output, {"environment": here, "rows": rows, "bytes_a_second": rates})
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
