"""Real runs for tests: each process is one of the operating system, started from a server that has the imports done.

A process gets the environment that torchrun would give it, runs a command, and ends with its exit code, so
it can be killed, stopped and restarted like one. Tests of the launchers themselves start the launchers.
"""

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ddpm_ema import cli, config, train
from ddpm_ema.rundir import RunDir

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["live_runs", "accelerate", "ddpm_ema.score", "torch_fidelity"])

TINY: dict[str, Any] = {
    "data": {"source": "digits", "image_size": 8, "channels": 1},
    "model": {"block_out_channels": [8, 16], "layers_per_block": 1, "attention": [False, True], "norm_num_groups": 4},
    "diffusion": {"num_train_timesteps": 100},
    "training": {
        "steps": 12,
        "batch_size": 16,
        "learning_rate": 2e-3,
        "log_every": 1,
        "warmup_steps": 4,
    },
    "machine": {"device": "cpu", "timeout": 20.0},
    "averages": {
        "ema_0_9": {"kind": "constant", "decay": 0.9},
        "power_0_10": {"kind": "power_function", "std": 0.10},
    },
    "checkpoints": {"every": 4, "keep": 3},
    "evaluation": {"num_images": 8, "sampler": "ddim", "num_inference_steps": 4, "extractors": ["classifier"]},
}


# The paper's learning rate: what rounding does to a weight in a step is a fraction of it, since Adam divides by the gradient.
FIFTY = {"training__steps": 50, "checkpoints__every": 50, "training__learning_rate": 2e-4}


def settings(output_dir: Path, **changes: Any) -> config.Config:
    """The tiny configuration, with changes by dotted key (`training__steps=20`; a dict replaces a whole mapping)."""
    return changed(json.loads(json.dumps(TINY)) | {"output_dir": str(output_dir)}, changes)


def changed(tree: dict[str, Any], changes: Mapping[str, Any]) -> config.Config:
    for key, value in changes.items():
        *parents, leaf = key.split("__")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = value
    return config.validate(tree)


class Launch:
    """Processes of one run. `output(rank)` is what a process said, stdout and stderr together."""

    def __init__(self, processes: list[Any], logs: list[Path]) -> None:
        self.processes, self.logs = processes, logs

    def wait(self, seconds: float = 240.0) -> list[int]:
        """Exit codes by rank; -9 for a process that was killed."""
        deadline = time.monotonic() + seconds
        for rank, process in enumerate(self.processes):
            process.join(max(0.1, deadline - time.monotonic()))
            if process.is_alive():
                self.signal(signal.SIGKILL)
                raise AssertionError(f"rank {rank} still ran after {seconds} s:\n{self.output(rank)}")
        return [process.exitcode for process in self.processes]

    def signal(self, number: int, rank: int | None = None) -> None:
        for process in self.processes if rank is None else [self.processes[rank]]:
            if process.is_alive():
                os.kill(process.pid, number)

    def output(self, rank: int = 0) -> str:
        return self.logs[rank].read_text(errors="replace") if self.logs[rank].exists() else ""


def start(
    run: config.Config,
    world_size: int = 1,
    before: Callable[[], None] | None = None,
    log_dir: Path | None = None,
    command: Callable[[config.Config], Any] = train.run,
) -> Launch:
    """Starts a run. `before` is called in each process first: a module-level function that breaks something."""
    log_dir = log_dir or run.output_dir.parent
    log_dir.mkdir(parents=True, exist_ok=True)
    port = free_port()
    stamp = time.monotonic_ns()
    logs = [log_dir / f"{run.output_dir.name}-{stamp}-rank{rank}.log" for rank in range(world_size)]
    tree = config.to_dict(run)
    processes = [
        CONTEXT.Process(target=_work, args=(command, tree, rank, world_size, port, str(logs[rank]), before))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return Launch(processes, logs)


def finish(run: config.Config, world_size: int = 1, **more: Any) -> Launch:
    """Starts a run and expects it to end well."""
    launch = start(run, world_size, **more)
    codes = launch.wait()
    assert codes == [0] * world_size, "\n".join(launch.output(rank) for rank in range(world_size))
    return launch


def _work(
    command: Callable[[config.Config], Any],
    tree: Mapping[str, Any],
    rank: int,
    world_size: int,
    port: int,
    log: str,
    before: Callable[[], None] | None,
) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    if world_size > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size)
        )
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if before is not None:
        before()
    code = cli.guard(command, config.validate(tree))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], bool], seconds: float = 180.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not happen"
        time.sleep(0.005)


def rows(run: config.Config | Path) -> list[dict[str, Any]]:
    """Whole rows of metrics.jsonl, which may still be written."""
    path = RunDir(run if isinstance(run, Path) else run.output_dir).metrics_path
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def wait_for_row(run: config.Config, step: int, seconds: float = 180.0) -> None:
    wait_until(lambda: any(row["step"] >= step for row in rows(run)), seconds)


def kill_at(launch: Launch, run: config.Config, step: int, delay: float = 0.0) -> None:
    """SIGKILL to every rank once `step` was logged, or the run ended."""
    wait_until(lambda: any(row["step"] >= step for row in rows(run)) or not launch.processes[0].is_alive())
    time.sleep(delay)
    launch.signal(signal.SIGKILL)
    launch.wait()


EXACT = ("step", "loss", "loss_q0", "loss_q1", "loss_q2", "loss_q3", "grad_norm", "learning_rate", "skipped_steps")


def exact(run: config.Config) -> list[tuple[Any, ...]]:
    """What of metrics.jsonl does not depend on clocks."""
    return [
        tuple(value for key, value in row.items() if key in EXACT or key.startswith(("decay/", "distance/")))
        for row in rows(run)
    ]


def state(run: config.Config, step: int | None = None) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint (the last one), by file and name."""
    checkpoints = RunDir(run.output_dir).checkpoints()
    checkpoint = checkpoints[-1] if step is None else RunDir(run.output_dir).checkpoint(step)
    return {
        f"{file}:{name}": tensor
        for file in checkpoint.manifest["files"]
        for name, tensor in checkpoint.tensors(file).items()
    }


def assert_bit_equal(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different, f"{len(different)} of {len(left)} tensors differ, such as {different[:3]}"
