"""One run is the same run on any number of processes, in micro-batches, under any launcher, and whatever else it makes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from live_runs import FIFTY, assert_bit_equal, finish, free_port, rows, settings, start, state, wait_for_row

from ddpm_ema import config, train
from ddpm_ema.rundir import RunDir

ROOT = Path(__file__).resolve().parents[2]


LAUNCHES = {
    "accelerate": ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"],
    "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node", "2"],
    "ours": ["-m", "ddpm_ema.launch", "--nproc_per_node", "2"],
}


def assert_same_run(run: config.Config, other: config.Config) -> None:
    """Same losses a step, and same raw and averaged weights, to 1e-5.

    All weights but the biases of attention's keys: softmax does not depend on them, so their gradient is zero but for
    rounding, which Adam scales up to a step like any other. They have no effect on what the network computes.
    """
    for mine, theirs in zip(rows(run), rows(other), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    left, right = state(run), state(other)
    weights = [key for key in left if not key.startswith("optimizer") and not key.endswith("to_k.bias")]
    assert len(weights) > 100
    for key in weights:
        assert torch.allclose(left[key], right[key], rtol=0, atol=1e-5), key


@pytest.mark.parametrize(
    ("world_size", "micro_batch_size", "split"),
    [
        pytest.param(1, 4, None, marks=pytest.mark.slow),
        pytest.param(2, None, None, marks=pytest.mark.slow),
        (2, 3, False),
        pytest.param(3, None, True, marks=pytest.mark.slow),
    ],
    ids=[
        "micro-batches of a quarter",
        "two processes",
        "two processes, micro-batches, whole averages",
        "three processes",
    ],
)
def test_processes_and_micro_batches_do_not_change_the_run(
    fifty_steps: config.Config, tmp_path: Path, world_size: int, micro_batch_size: int | None, split: bool | None
) -> None:
    run = settings(
        tmp_path / "run",
        **FIFTY,
        training__micro_batch_size=micro_batch_size,
        training__split_averages=split,
    )
    finish(run, world_size)
    assert_same_run(run, fifty_steps)


def test_a_run_that_samples_and_snapshots_trains_bit_equal_to_one_that_does_not(
    uninterrupted: config.Config, tmp_path: Path
) -> None:
    run = settings(tmp_path / "run", training__steps=40, training__sample_every=15, checkpoints__snapshots_every=10)
    train.run(run)
    assert_bit_equal(state(run), state(uninterrupted))
    assert (run.output_dir / "samples" / "step-00000030.png").exists()
    assert [p.parent.name for p in RunDir(run.output_dir).snapshots()["power_0_10"]] == [
        f"step-{step:08d}" for step in (10, 20, 30, 40)
    ]


@pytest.mark.slow
def test_a_resumed_run_on_other_numbers_of_processes_sees_the_same_stream(
    fifty_steps: config.Config, tmp_path: Path
) -> None:
    run = settings(tmp_path / "run", **{**FIFTY, "checkpoints__every": 10})
    for world_size, step in ((2, 12), (1, 24)):
        launch = start(run, world_size)
        wait_for_row(run, step)
        launch.signal(signal.SIGTERM)
        assert launch.wait() == [75] * world_size
    launch = finish(run, 3)
    assert "going on with 3 process(es) instead of 1" in launch.output()
    assert_same_run(run, fifty_steps)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHES)
def test_every_launcher_gives_two_cpu_processes_that_train_the_same_run(
    fifty_steps: config.Config, tmp_path: Path, launcher: str
) -> None:
    run = settings(tmp_path / "run", **FIFTY, machine__world_size=2)
    path = tmp_path / "settings.yaml"
    path.write_text(config.to_yaml(run))
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "MASTER_PORT": str(free_port()),
    }
    port = ["--master_port" if launcher != "accelerate" else "--main_process_port", environment["MASTER_PORT"]]
    command = [sys.executable, *LAUNCHES[launcher], *port, "scripts/train.py", "--config", str(path)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "processes    2" in result.stderr
    assert "Warning" not in result.stderr
    assert_same_run(run, fifty_steps)
