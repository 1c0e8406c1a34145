"""A run that is killed goes on bit equal; one that is asked to stop saves and ends with 75."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from live_runs import (
    assert_bit_equal,
    exact,
    finish,
    kill_at,
    rows,
    settings,
    start,
    state,
    wait_for_row,
    wait_until,
)

from ddpm_ema import config, data
from ddpm_ema.rundir import RunDir, directory

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_bit_equal_to_one_never_killed(
    uninterrupted: config.Config, tmp_path: Path
) -> None:
    run = settings(tmp_path / "run", training__steps=40)
    chance = random.Random(5)
    for step in (1, 6, 17, 28):  # before the first checkpoint, and between later ones; some delays end inside a save
        kill_at(start(run), run, step, delay=chance.uniform(0, 0.15))
    finish(run)
    assert_bit_equal(state(run), state(uninterrupted))
    assert exact(run) == exact(uninterrupted)
    assert [row["step"] for row in rows(run)] == list(range(1, 41))


@pytest.mark.slow
def test_with_dropout_a_resumed_run_is_still_bit_equal(tmp_path: Path) -> None:
    whole = settings(tmp_path / "whole", training__steps=12, model__dropout=0.2)
    finish(whole)
    run = settings(tmp_path / "run", training__steps=12, model__dropout=0.2)
    kill_at(start(run), run, 6)
    finish(run)
    assert_bit_equal(state(run), state(whole))


def test_two_processes_of_which_one_is_killed_go_on_bit_equal(tmp_path: Path) -> None:
    whole = settings(tmp_path / "whole", training__steps=30)
    finish(whole, 2)
    run = settings(tmp_path / "run", training__steps=30)
    launch = start(run, 2)
    wait_for_row(run, 10)
    launch.signal(signal.SIGKILL, rank=1)
    codes = launch.wait(40)
    assert codes == [75, -9]
    assert "rank 1 no longer answers" in launch.output(0)
    finish(run, 2)
    assert_bit_equal(state(run), state(whole))
    assert exact(run) == exact(whole)


def slow_saving() -> None:
    """Holds every save open for a second, before its manifest is written."""
    write = directory.save_tensors

    def slowly(*arguments):
        time.sleep(0.35)
        return write(*arguments)

    directory.save_tensors = slowly


def test_a_kill_in_the_middle_of_a_save_falls_back_to_the_checkpoint_before(
    uninterrupted: config.Config, tmp_path: Path
) -> None:
    run = settings(tmp_path / "run", training__steps=40)
    launch = start(run, before=slow_saving)
    folder = run.output_dir / "checkpoints"
    wait_until(lambda: any("00000008" in p.name and "partial" in p.name for p in folder.glob(".*")))
    launch.signal(signal.SIGKILL)
    launch.wait()
    assert [c.step for c in RunDir(run.output_dir).checkpoints()] == [4]
    assert list(folder.glob(".*.partial")), "the kill really hit a save"
    finish(run)
    assert_bit_equal(state(run), state(uninterrupted))


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_sigterm_to_one_rank_saves_the_same_step_everywhere_and_ends_with_75(
    uninterrupted: config.Config, tmp_path: Path, world_size: int
) -> None:
    run = settings(tmp_path / "run", training__steps=40, checkpoints__every=1000)
    launch = start(run, world_size)
    wait_for_row(run, 5)
    launch.signal(signal.SIGTERM, rank=world_size - 1)
    assert launch.wait() == [75] * world_size
    said = [line for rank in range(world_size) for line in launch.output(rank).splitlines()]
    stopped = [line for line in said if line.startswith("stopped by SIGTERM")]
    assert len(stopped) == 1, "one rank says it for all"
    step = RunDir(run.output_dir).checkpoints()[-1].step
    assert f"at step {step}; saved" in stopped.pop()
    assert step < 40
    finish(run, world_size)
    if world_size == 1:
        assert_bit_equal(state(run), state(uninterrupted))
        assert exact(run) == exact(uninterrupted)


def test_a_hangup_saves_because_a_lost_terminal_must_not_cost_the_work(tmp_path: Path) -> None:
    run = settings(tmp_path / "run", training__steps=4000, checkpoints__every=4000)
    launch = start(run)
    wait_for_row(run, 5)
    launch.signal(signal.SIGHUP)
    assert launch.wait() == [75]
    assert RunDir(run.output_dir).checkpoints()[-1].step >= 5


def images_that_take_an_hour() -> None:
    data.load = lambda _: (os.write(1, b"reading\n"), time.sleep(3600))


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_stop_before_there_is_anything_to_save_is_not_kept_waiting_by_the_images(
    tmp_path: Path, world_size: int
) -> None:
    launch = start(settings(tmp_path / "run"), world_size, before=images_that_take_an_hour)
    wait_until(lambda: "reading" in launch.output())
    launch.signal(signal.SIGINT)
    assert launch.wait() == [75] * world_size
    assert "SIGINT: nothing to save: ending" in launch.output()


@pytest.mark.slow
def test_sigterm_while_saving_and_a_second_one_give_one_clean_exit(
    uninterrupted: config.Config, tmp_path: Path
) -> None:
    run = settings(tmp_path / "run", training__steps=40)
    launch = start(run, before=slow_saving)
    wait_until(lambda: bool(list((run.output_dir / "checkpoints").glob(".step-00000004*"))))
    launch.signal(signal.SIGTERM)
    time.sleep(0.2)
    launch.signal(signal.SIGTERM)
    assert launch.wait() == [75]
    assert "Traceback" not in launch.output()
    newest, passed_over = RunDir(run.output_dir).newest_whole()
    assert newest is not None
    assert passed_over == []
    finish(run)
    assert_bit_equal(state(run), state(uninterrupted))


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("stop", ["launcher alone", pytest.param("launcher killed", marks=pytest.mark.slow)])
def test_when_accelerate_s_launcher_is_gone_the_trainer_saves_and_ends(tmp_path: Path, stop: str) -> None:
    run = settings(tmp_path / "run", training__steps=100_000, checkpoints__every=100_000)
    path = tmp_path / "settings.yaml"
    path.write_text(config.to_yaml(run))
    command = ["-m", "accelerate.commands.launch", "--num_processes", "1", "scripts/train.py", "--config", str(path)]
    launcher = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    wait_for_row(run, 3)
    children = psutil.Process(launcher.pid).children(recursive=True)
    assert children
    launcher.send_signal(signal.SIGTERM if stop == "launcher alone" else signal.SIGKILL)
    launcher.wait(30)
    wait_until(lambda: not any(alive(child) for child in children))
    newest, _ = RunDir(run.output_dir).newest_whole()
    assert newest.step >= 3


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_killed_twenty_times_ends_bit_equal_to_one_never_killed(tmp_path: Path, world_size: int) -> None:
    whole = settings(tmp_path / "whole", training__steps=120, checkpoints__every=5)
    finish(whole, world_size)
    run = settings(tmp_path / "run", training__steps=120, checkpoints__every=5)
    chance = random.Random(world_size)
    for kill in range(20):
        kill_at(start(run, world_size), run, 5 * kill + chance.randrange(6), delay=chance.uniform(0, 0.12))
    finish(run, world_size)
    assert_bit_equal(state(run), state(whole))
    assert exact(run) == exact(whole)
