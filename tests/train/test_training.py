"""What the trainer promises: one run is the same run on any number of processes, in micro-batches, and after any kill."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import live_runs as runs
import pytest
import torch
from live_runs import assert_bit_equal, exact, finish, settings, start, state, wait_until

from ddpm_ema import StochasticWeightAverage, config
from ddpm_ema.averaging import RAW, Snapshot
from ddpm_ema.config import TrainingSettings
from ddpm_ema.rundir import RunDir, read_tensors

ROOT = Path(__file__).resolve().parents[2]
# The paper's learning rate: what rounding does to a weight in a step is a fraction of it, since Adam divides by the gradient.
FIFTY = {"training__steps": 50, "checkpoints__every": 50, "training__learning_rate": 2e-4}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> config.Config:
    """A run of 40 steps on one process that nobody disturbed."""
    run = settings(tmp_path_factory.mktemp("whole") / "run", training__steps=40)
    finish(run)
    return run


@pytest.fixture(scope="module")
def fifty_steps(tmp_path_factory: pytest.TempPathFactory) -> config.Config:
    run = settings(tmp_path_factory.mktemp("fifty") / "run", **FIFTY)
    finish(run)
    return run


def assert_same_run(run: config.Config, other: config.Config) -> None:
    """Same losses a step, and same raw and averaged weights, to 1e-5.

    All weights but the biases of attention's keys: softmax does not depend on them, so their gradient is zero but for
    rounding, which Adam scales up to a step like any other. They have no effect on what the network computes.
    """
    for mine, theirs in zip(runs.rows(run), runs.rows(other), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    left, right = state(run), state(other)
    weights = [key for key in left if not key.startswith("optimizer") and not key.endswith("to_k.bias")]
    assert len(weights) > 100
    for key in weights:
        assert torch.allclose(left[key], right[key], rtol=0, atol=1e-5), key


@pytest.mark.parametrize(
    ("world_size", "micro_batch_size", "split"),
    [(1, 4, None), (2, None, None), (2, 3, False), (3, None, True)],
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


def test_another_seed_is_another_run(fifty_steps: config.Config, tmp_path: Path) -> None:
    run = settings(tmp_path / "run", seed=1, training__steps=2)
    finish(run)
    assert runs.rows(run)[0]["loss"] != pytest.approx(runs.rows(fifty_steps)[0]["loss"], rel=1e-3)


def kill_at(launch: runs.Launch, run: config.Config, step: int, delay: float = 0.0) -> None:
    """SIGKILL to every rank once `step` was logged."""
    wait_until(lambda: any(row["step"] >= step for row in safe_rows(run)) or not launch.processes[0].is_alive())
    time.sleep(delay)
    launch.signal(signal.SIGKILL)
    launch.wait()


def safe_rows(run: config.Config) -> list[dict[str, float]]:
    """Rows that are whole, of a file that is being written."""
    try:
        text = RunDir(run.output_dir).metrics_path.read_text()
    except OSError:
        return []
    return [json.loads(line) for line in text.split("\n")[:-1] if line.endswith("}")]


def test_a_run_killed_at_random_moments_ends_bit_equal_to_one_never_killed(
    uninterrupted: config.Config, tmp_path: Path
) -> None:
    run = settings(tmp_path / "run", training__steps=40)
    chance = random.Random(5)
    for step in (
        1,
        6,
        17,
        28,
    ):  # before the first checkpoint, and between later ones; the delays land some inside a save
        kill_at(start(run), run, step, delay=chance.uniform(0, 0.15))
    finish(run)
    assert_bit_equal(state(run), state(uninterrupted))
    assert exact(run) == exact(uninterrupted)
    assert [row["step"] for row in runs.rows(run)] == list(range(1, 41))


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


def test_two_processes_of_which_one_is_killed_go_on_bit_equal(tmp_path: Path) -> None:
    whole = settings(tmp_path / "whole", training__steps=30)
    finish(whole, 2)
    run = settings(tmp_path / "run", training__steps=30)
    launch = start(run, 2)
    wait_until(lambda: len(safe_rows(run)) >= 10)
    launch.signal(signal.SIGKILL, rank=1)
    codes = launch.wait(40)
    assert codes == [75, -9]
    assert "rank 1 no longer answers" in launch.output(0)
    finish(run, 2)
    assert_bit_equal(state(run), state(whole))
    assert exact(run) == exact(whole)


def slow_saving() -> None:
    """Holds every save open for a second, before its manifest is written."""
    import ddpm_ema.rundir as rundir

    write = rundir._write_entry

    def slowly(*args: object) -> object:
        time.sleep(0.35)
        return write(*args)  # type: ignore[arg-type]

    rundir._write_entry = slowly  # type: ignore[assignment]


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


@pytest.mark.parametrize("world_size", [1, 2])
def test_sigterm_to_one_rank_saves_the_same_step_everywhere_and_ends_with_75(
    uninterrupted: config.Config, tmp_path: Path, world_size: int
) -> None:
    run = settings(tmp_path / "run", training__steps=40, checkpoints__every=1000)
    launch = start(run, world_size)
    wait_until(lambda: len(safe_rows(run)) >= 5)
    launch.signal(signal.SIGTERM, rank=world_size - 1)
    assert launch.wait() == [75] * world_size
    said = [launch.output(rank) for rank in range(world_size)]
    stopped = {line for text in said for line in text.splitlines() if line.startswith("error: stopped by SIGTERM")}
    assert len(stopped) == 1, "every rank names the same step"
    step = RunDir(run.output_dir).checkpoints()[-1].step
    assert f"at step {step}; saved" in stopped.pop()
    assert step < 40
    finish(run, world_size)
    if world_size == 1:
        assert_bit_equal(state(run), state(uninterrupted))
        assert exact(run) == exact(uninterrupted)


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


def test_the_window_of_a_logged_mean_survives_a_stop_between_two_rows(tmp_path: Path) -> None:
    whole = settings(tmp_path / "whole", training__steps=20, training__log_every=10)
    finish(whole)
    run = settings(tmp_path / "run", training__steps=20, training__log_every=10, checkpoints__every=7)
    launch = start(run)
    wait_until(lambda: bool(RunDir(run.output_dir).checkpoints()))
    launch.signal(signal.SIGKILL)
    launch.wait()
    finish(run)
    assert exact(run) == exact(whole)


def test_a_run_that_samples_and_snapshots_trains_bit_equal_to_one_that_does_not(
    uninterrupted: config.Config, tmp_path: Path
) -> None:
    run = settings(tmp_path / "run", training__steps=40, training__sample_every=15, checkpoints__snapshots_every=10)
    finish(run)
    assert_bit_equal(state(run), state(uninterrupted))
    assert (run.output_dir / "samples" / "step-00000030.png").exists()
    assert [p.parent.name for p in RunDir(run.output_dir).snapshots()["power_0_10"]] == [
        f"step-{step:08d}" for step in (10, 20, 30, 40)
    ]


@pytest.mark.parametrize("world_size", [1, 2])
def test_snapshots_are_of_what_was_named_and_of_the_initial_weights_once(tmp_path: Path, world_size: int) -> None:
    averages = {
        "ema": {"kind": "constant", "decay": 0.9},
        "wide": {"kind": "uniform"},
        "p": {"kind": "power_function", "std": 0.1},
    }
    chosen = {"averages": averages, "checkpoints__snapshots_every": 4, "checkpoints__every": 8, "training__steps": 8}
    run = settings(tmp_path / "run", **chosen, checkpoints__snapshots=["raw", "ema"])
    finish(run, world_size)
    found = {
        name: [Snapshot.open(path) for path in paths] for name, paths in RunDir(run.output_dir).snapshots().items()
    }
    assert {name: [snapshot.step for snapshot in stored] for name, stored in found.items()} == {
        "raw": [0, 4, 8],
        "ema": [4, 8],
    }
    assert found["raw"][0].profile == found["raw"][2].profile == RAW
    first, last = (read_tensors(found["raw"][place].path) for place in (0, 2))
    assert_bit_equal(first, initial_weights(run))
    assert_bit_equal(last, RunDir(run.output_dir).checkpoint(8).weights("raw"))
    by_default = settings(tmp_path / "default", **chosen)
    assert by_default.snapshot_names == ("wide", "p")


def test_resume_and_fallback_keep_the_snapshot_of_the_initial_weights_and_write_the_later_ones_anew(
    tmp_path: Path,
) -> None:
    run = settings(tmp_path / "run", training__steps=12, checkpoints__snapshots_every=2)
    finish(run)
    rundir = RunDir(run.output_dir)
    stored = {path: path.read_bytes() for paths in rundir.snapshots().values() for path in paths}
    assert rundir.snapshot_path(0, "raw") in stored
    (rundir.checkpoint(12).path / "raw.safetensors").write_bytes(b"")
    finish(run)
    assert {path: path.read_bytes() for paths in rundir.snapshots().values() for path in paths} == stored


def test_with_dropout_a_resumed_run_is_still_bit_equal(tmp_path: Path) -> None:
    whole = settings(tmp_path / "whole", training__steps=12, model__dropout=0.2)
    finish(whole)
    run = settings(tmp_path / "run", training__steps=12, model__dropout=0.2)
    kill_at(start(run), run, 6)
    finish(run)
    assert_bit_equal(state(run), state(whole))


@pytest.mark.slow
def test_a_resumed_run_on_other_numbers_of_processes_sees_the_same_stream(
    fifty_steps: config.Config, tmp_path: Path
) -> None:
    run = settings(tmp_path / "run", **{**FIFTY, "checkpoints__every": 10})
    for world_size, step in ((2, 12), (1, 24)):
        launch = start(run, world_size)
        wait_until(lambda step=step: len(safe_rows(run)) >= step)  # type: ignore[misc]
        launch.signal(signal.SIGTERM)
        assert launch.wait() == [75] * world_size
    launch = finish(run, 3)
    assert "going on with 3 process(es) instead of 1" in launch.output()
    assert_same_run(run, fifty_steps)


def overflowing_twice() -> None:
    """Starts the fp16 scaler so high that the first backward passes overflow."""
    import torch

    scaler = torch.amp.GradScaler

    def high(device: str, enabled: bool) -> torch.amp.GradScaler:
        return scaler(device, init_scale=2.0**40, enabled=enabled, backoff_factor=2.0**-10)

    torch.amp.GradScaler = high  # type: ignore[assignment,misc]


def test_a_step_that_fp16_skipped_moves_no_average_and_is_counted(tmp_path: Path) -> None:
    """As many optimizer steps as completed ones: Adam's own count, the averages' step and the rows agree."""
    run = settings(tmp_path / "run", training__mixed_precision="fp16", training__steps=8)
    finish(run, before=overflowing_twice)
    skipped = [row["skipped_steps"] for row in runs.rows(run)]
    assert skipped[-1] >= 2
    assert [row["step"] for row in runs.rows(run)] == list(range(1, 9))
    tensors = state(run)
    assert {float(t) for key, t in tensors.items() if ":step/" in key} == {8.0}
    plain = settings(tmp_path / "plain", training__steps=8)
    finish(plain)
    for key, tensor in state(plain).items():  # the same stream: a skipped step is tried again with the same images
        if key.startswith("raw"):
            assert torch.allclose(tensor, tensors[key], atol=2e-2), key


def poisoned_at_step_6() -> None:
    """One image's loss is not a number, on the last rank, in the sixth step."""
    import ddpm_ema.train.step as step

    losses = step.image_losses

    def poisoned(trainer: object, share: object) -> tuple[torch.Tensor, torch.Tensor]:
        loss, timesteps = losses(trainer, share)  # type: ignore[arg-type]
        if trainer.step == 5 and trainer.processes.rank == trainer.processes.world_size - 1:  # type: ignore[attr-defined]
            loss = loss * torch.where(torch.arange(len(loss)) == 2, torch.nan, 1.0)
        return loss, timesteps

    step.image_losses = poisoned


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_loss_that_is_not_finite_stops_all_ranks_before_anything_moves(tmp_path: Path, world_size: int) -> None:
    run = settings(tmp_path / "run")
    launch = start(run, world_size, before=poisoned_at_step_6)
    assert launch.wait() == [3] * world_size
    message = launch.output()
    positions = torch.tensor([2 if world_size == 1 else 8 + 2])
    from ddpm_ema.batch_order import batch_indices

    image = int(batch_indices(0, 5, positions, 16, 1797))
    assert f"step 6: rank {world_size - 1}: the loss of image {image} is not finite" in message
    assert "last checkpoint: step 4" in message
    assert "Traceback" not in message
    assert [row["step"] for row in runs.rows(run)] == [1, 2, 3, 4, 5]
    assert all(torch.isfinite(tensor).all() for tensor in state(run).values())
    finish(run, world_size)  # the poison gone, it goes on


def test_a_finished_run_says_so_and_rewrites_nothing(tmp_path: Path) -> None:
    run = settings(tmp_path / "run", training__steps=4)
    finish(run)
    before = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in run.output_dir.rglob("*") if p.name != ".lock"}
    launch = finish(run)
    assert "already complete at step 4" in launch.output()
    folders = {p: v for p, v in before.items() if p.is_file()}
    assert folders == {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in folders}


def test_a_longer_run_goes_on_from_a_finished_one(uninterrupted: config.Config, tmp_path: Path) -> None:
    short = settings(tmp_path / "run", training__steps=18)
    finish(short)
    longer = settings(tmp_path / "run", training__steps=40)
    finish(longer)
    assert_bit_equal(state(longer), state(uninterrupted))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model__initialization": "pytorch"}, "model.initialization: was ddpm, is pytorch"),
        ({"model__dropout": 0.1}, "model.dropout: was 0.0, is 0.1"),
        ({"diffusion__prediction": "sample"}, "diffusion.prediction: was epsilon, is sample"),
        ({"seed": 3}, "seed: was 0, is 3"),
        ({"training__batch_size": 32}, "training.batch_size: was 16, is 32"),
        ({"averages": {"ema_0_9": {"kind": "constant", "decay": 0.8}}}, "averages.ema_0_9: was"),
        ({"averages": {}}, "averages.power_0_10: was"),
    ],
)
def test_a_resume_with_other_settings_is_refused_with_the_fields_that_differ(
    uninterrupted: config.Config, tmp_path: Path, changes: dict[str, object], expected: str
) -> None:
    run = settings(uninterrupted.output_dir, training__steps=60, **changes)
    launch = start(run, log_dir=tmp_path)
    assert launch.wait() == [2]
    assert expected in launch.output()
    assert "Traceback" not in launch.output()
    assert RunDir(run.output_dir).newest_whole()[0].step == 40  # type: ignore[union-attr]


def test_an_average_added_on_resume_starts_at_the_raw_weights_when_a_setting_allows_it(tmp_path: Path) -> None:
    finish(settings(tmp_path / "run", training__steps=4))
    averages = {**runs.TINY["averages"], "late": {"kind": "constant", "decay": 1.0}}
    refused = start(settings(tmp_path / "run", training__steps=8, averages=averages))
    assert refused.wait() == [2]
    assert "averages.late: is new (--training.allow-new-averages" in refused.output()
    run = settings(tmp_path / "run", training__steps=8, averages=averages, training__allow_new_averages=True)
    finish(run)
    raw, late = (
        RunDir(run.output_dir).checkpoint(4).weights("raw"),
        RunDir(run.output_dir).checkpoint(8).weights("late"),
    )
    assert all(torch.equal(raw[name], late[name]) for name in raw)


def test_another_batch_size_goes_on_when_a_setting_allows_it(tmp_path: Path) -> None:
    finish(settings(tmp_path / "run", training__steps=4))
    run = settings(tmp_path / "run", training__steps=6, training__batch_size=8, training__allow_batch_size_change=True)
    finish(run)
    assert [row["step"] for row in runs.rows(run)] == [1, 2, 3, 4, 5, 6]


def test_another_data_set_on_resume_is_refused_with_both_names(tmp_path: Path) -> None:
    from PIL import Image

    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(20):
        Image.new("L", (8, 8), number * 10).save(folder / f"{number}.png")
    finish(settings(tmp_path / "run", training__steps=4))
    run = settings(tmp_path / "run", training__steps=8, data__source="folder", data__path=str(folder))
    launch = start(run)
    assert launch.wait() == [2]
    assert "digits (1797 images" in launch.output()
    assert "(20 images" in launch.output()


def test_when_every_checkpoint_is_bad_it_refuses_to_start_over_and_names_the_flag_that_does(tmp_path: Path) -> None:
    run = settings(tmp_path / "run")
    finish(run)
    for checkpoint in RunDir(run.output_dir).checkpoints():
        path = checkpoint.path / "raw.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    launch = start(run)
    assert launch.wait() == [2]
    assert "--training.resume fresh" in launch.output()
    fresh = settings(tmp_path / "run", training__resume="fresh")
    finish(fresh)
    assert (run.output_dir / "previous-1" / "checkpoints").is_dir()
    assert len(runs.rows(fresh)) == 12


def test_a_bad_newest_checkpoint_is_passed_over_with_one_warning(uninterrupted: config.Config, tmp_path: Path) -> None:
    run = settings(tmp_path / "run", training__steps=40)
    kill_at(start(run), run, 14)
    newest = RunDir(run.output_dir).checkpoints()[-1]
    path = newest.path / "optimizer.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    launch = finish(run)
    assert launch.output().count("passed over a checkpoint") == 1
    assert f"{path}: sha256 mismatch" in launch.output()
    assert_bit_equal(state(run), state(uninterrupted))
    assert exact(run) == exact(uninterrupted)


def test_never_refuses_a_used_folder(tmp_path: Path) -> None:
    finish(settings(tmp_path / "run", training__steps=4))
    launch = start(settings(tmp_path / "run", training__steps=8, training__resume="never"))
    assert launch.wait() == [2]
    assert "training.resume is never" in launch.output()


def test_a_second_run_in_the_same_folder_is_refused_on_every_rank(tmp_path: Path) -> None:
    run = settings(tmp_path / "run", training__steps=400, checkpoints__every=1000)
    first = start(run)
    wait_until(lambda: len(safe_rows(run)) >= 2)
    second = start(run, 2)
    assert second.wait() == [2, 2]
    assert f"process {first.processes[0].pid} on host" in second.output()
    first.signal(signal.SIGTERM)
    assert first.wait() == [75]


def test_data_workers_do_not_disturb_a_stop(tmp_path: Path) -> None:
    from PIL import Image

    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(40):
        Image.new("L", (8, 8), number * 5).save(folder / f"{number}.png")
    run = settings(
        tmp_path / "run",
        training__steps=4000,
        checkpoints__every=5000,
        data__source="folder",
        data__path=str(folder),
        data__storage="stream",
    )
    launch = start(run)
    wait_until(lambda: len(safe_rows(run)) >= 5)
    import psutil

    process = psutil.Process(launch.processes[0].pid)
    children = process.children(recursive=True)
    assert children, "there are workers"
    for each in [process, *children]:  # as a terminal or a container runtime does: the whole group
        each.send_signal(signal.SIGTERM)
    assert launch.wait() == [75]
    assert "Traceback" not in launch.output()
    wait_until(lambda: not any(c.is_running() and c.status() != psutil.STATUS_ZOMBIE for c in children), 15)


def test_what_the_machine_lacks_is_an_error_before_any_data_is_read(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    run = settings(tmp_path / "run", machine__device="cuda", data__source="folder", data__path="/nowhere")
    launch = start(run)
    assert launch.wait() == [2]
    assert "machine.device: cuda was asked for, and there is no CUDA device" in launch.output()
    assert not run.output_dir.exists()


def test_a_wrong_number_of_processes_is_refused_when_one_was_asked_for(tmp_path: Path) -> None:
    launch = start(settings(tmp_path / "run", machine__world_size=2))
    assert launch.wait() == [2]
    assert "2 processes were asked for, the launch gives 1" in launch.output()


def test_fewer_images_than_a_batch_is_an_error(tmp_path: Path) -> None:
    launch = start(settings(tmp_path / "run", training__batch_size=2000))
    assert launch.wait() == [2]
    assert "1797 images, fewer than one batch" in launch.output()


def out_of_memory_at_step_6() -> None:
    import ddpm_ema.train.step as step

    losses = step.image_losses

    def hungry(trainer: object, share: object) -> object:
        if trainer.step == 5:  # type: ignore[attr-defined]
            torch.empty(2**50)  # as much as no machine has: the allocator itself refuses
        return losses(trainer, share)  # type: ignore[arg-type]

    step.image_losses = hungry  # type: ignore[assignment]


def test_out_of_memory_says_what_to_lower_and_which_checkpoint_there_is(tmp_path: Path) -> None:
    launch = start(settings(tmp_path / "run"), before=out_of_memory_at_step_6)
    assert launch.wait() == [2]
    assert "lower training.micro_batch_size" in launch.output()
    assert "last checkpoint: step 4" in launch.output()


def full_disk_at_second_save() -> None:
    import shutil

    usage, seen = shutil.disk_usage, []

    def full(path: str) -> object:
        seen.extend(["second save"] if "00000008" in str(path) else [])
        real = usage(path)
        return type(real)(real.total, real.total - 17, 17) if seen else real

    shutil.disk_usage = full  # type: ignore[assignment]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_disk_that_fills_up_ends_all_ranks_with_one_message(tmp_path: Path, world_size: int) -> None:
    run = settings(tmp_path / "run", training__steps=400, checkpoints__every=8, training__log_every=100)
    launch = start(run, world_size, before=full_disk_at_second_save)
    assert launch.wait() == [2] * world_size
    assert "the disk is full" in launch.output()
    assert "17 free" in launch.output()
    assert "Traceback" not in launch.output()


def tracker_that_fails() -> None:
    from accelerate import Accelerator

    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("server is down")

    Accelerator.log = fail  # type: ignore[method-assign]


def test_a_tracker_that_is_down_costs_one_warning(tmp_path: Path) -> None:
    run = settings(tmp_path / "run", training__trackers=["tensorboard"])
    launch = finish(run, before=tracker_that_fails)
    assert launch.output().count("warning: a tracker failed") == 1
    assert len(runs.rows(run)) == 12


def test_rows_say_what_a_person_needs_to_know(uninterrupted: config.Config) -> None:
    row = runs.rows(uninterrupted)[-1]
    wanted = {"step", "loss", "loss_q0", "loss_q3", "grad_norm", "learning_rate", "images_per_second", "data_wait"}
    wanted |= {"skipped_steps", "peak_memory", "save_seconds", "decay/ema_0_9", "distance/power_0_10"}
    assert wanted <= row.keys()
    assert row["decay/ema_0_9"] == 0.9
    assert 0 < row["distance/power_0_10"] < 1
    tensors = state(uninterrupted)
    raw = torch.cat([t.flatten() for key, t in tensors.items() if key.startswith("raw")]).double()
    ema = torch.cat([t.flatten() for key, t in tensors.items() if key.startswith("averages/ema_0_9.")]).double()
    assert row["distance/ema_0_9"] == pytest.approx(((ema - raw).norm() / raw.norm()).item(), rel=1e-6)


def test_a_run_says_before_its_first_step_what_its_averages_will_be_worth_and_resolves_their_lengths(
    tmp_path: Path,
) -> None:
    averages = {
        "ema_0_9999": {"kind": "constant", "decay": 0.9999},
        "last_half": {"kind": "window", "length": "50%", "end": "100%"},
    }
    run = settings(tmp_path / "run", training__steps=6, checkpoints__every=1, averages=averages)
    table = finish(run).output().split("initial weights\n")[1].splitlines()
    assert table[0].split() == ["ema_0_9999", "10,000", "6", "0.0%", "99.9%"]
    assert table[1].split() == ["last_half", "-", "3", "83.3%", "0.0%"]
    assert table[2].startswith("warning: ema_0_9999 will still hold 100% of the initial weights after 6 steps: use")
    last = RunDir(run.output_dir).checkpoint(6)
    assert last.manifest["profiles"]["last_half"] == {"kind": "window", "length": 3, "end": 6}
    raw = [RunDir(run.output_dir).checkpoint(step).weights("raw") for step in (4, 5, 6)]
    for name, mean in last.weights("last_half").items():
        assert torch.allclose(mean, sum(weights[name] for weights in raw) / 3, rtol=1e-5, atol=1e-7)


def test_the_averages_are_those_of_the_raw_weights_at_every_step(tmp_path: Path) -> None:
    """Saved at every step, the raw weights give the averages anew in float64, by the profile alone."""
    run = settings(tmp_path / "run", training__steps=9, checkpoints__every=1, checkpoints__keep=100)
    finish(run)
    checkpoints = RunDir(run.output_dir).checkpoints()
    assert [c.step for c in checkpoints] == list(range(1, 10))
    for name, profile in run.averages.items():
        average: dict[str, torch.Tensor] = {}
        for checkpoint in checkpoints:
            decay = profile.decay(checkpoint.step)
            if checkpoint.step == 1 and decay > 0:
                start_weights = initial_weights(run)
                average = {k: v.double() for k, v in start_weights.items()}
            for key, value in checkpoint.weights("raw").items():
                average[key] = (
                    decay * average[key] + (1 - decay) * value.double()
                    if average.get(key) is not None
                    else value.double()
                )
        saved = checkpoints[-1].weights(name)
        for key, value in average.items():
            assert torch.allclose(saved[key].double(), value, rtol=0, atol=1e-6), (name, key)


def initial_weights(run: config.Config) -> dict[str, torch.Tensor]:
    from ddpm_ema import model

    return dict(model.build(run, 10).state_dict())


def test_learning_rate_schedules_are_hand_computed_tables() -> None:
    def table(steps: int, at: list[int], **changes: object) -> list[float]:
        given = TrainingSettings(steps=steps, learning_rate=1.0, **changes)  # type: ignore[arg-type]
        return [round(given.learning_rate_at(step), 6) for step in at]

    assert table(100, [0, 1, 3, 4, 99], warmup_steps=4) == [0.25, 0.5, 1.0, 1.0, 1.0]
    assert table(5, [0, 1, 2, 3, 4], learning_rate_schedule="linear") == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert table(5, [0, 2, 4], learning_rate_schedule="cosine", learning_rate_end=0.2) == [1.0, 0.6, 0.2]
    cycle = {"learning_rate_schedule": "cyclical", "cycle_steps": 3, "learning_rate_end": 0.5}
    assert table(99, [0, 1, 2, 3, 4, 5], **cycle) == [1.0, 0.75, 0.5, 1.0, 0.75, 0.5]


def test_swa_takes_its_snapshots_where_the_cyclical_learning_rate_is_lowest() -> None:
    given = TrainingSettings(
        steps=40, learning_rate_schedule="cyclical", cycle_steps=10, learning_rate_end=1e-5, warmup_steps=5
    )
    swa = StochasticWeightAverage(start=5 + 10, every=10)
    taken = [step for step in range(1, 41) if swa.weighting(40)[step - 1] > 0]
    assert taken == [15, 25, 35]
    assert taken == [step for step in range(6, 41) if given.learning_rate_at(step - 1) == pytest.approx(1e-5)]


def processes_below(pid: int) -> list[int]:
    import psutil

    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


@pytest.mark.parametrize("stop", ["launcher alone", pytest.param("launcher killed", marks=pytest.mark.slow)])
def test_when_accelerate_s_launcher_is_gone_the_trainer_saves_and_ends(tmp_path: Path, stop: str) -> None:
    run = settings(tmp_path / "run", training__steps=100_000, checkpoints__every=100_000)
    path = tmp_path / "settings.yaml"
    path.write_text(config.to_yaml(run))
    command = ["-m", "accelerate.commands.launch", "--num_processes", "1", "scripts/train.py", "--config", str(path)]
    launcher = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    wait_until(lambda: len(safe_rows(run)) >= 3, 120)
    children = processes_below(launcher.pid)
    assert children
    launcher.send_signal(signal.SIGTERM if stop == "launcher alone" else signal.SIGKILL)
    launcher.wait(30)
    import psutil

    wait_until(lambda: not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in children))
    newest, _ = RunDir(run.output_dir).newest_whole()
    assert newest is not None
    assert newest.step >= 3


LAUNCHES = {
    "accelerate": ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"],
    "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node", "2"],
    "ours": ["-m", "ddpm_ema.launch", "--nproc_per_node", "2"],
}


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
        "MASTER_PORT": str(runs.free_port()),
    }
    port = ["--master_port" if launcher != "accelerate" else "--main_process_port", environment["MASTER_PORT"]]
    command = [sys.executable, *LAUNCHES[launcher], *port, "scripts/train.py", "--config", str(path)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "processes    2" in result.stderr
    assert_same_run(run, fifty_steps)


def test_compiling_without_a_compiler_is_an_error_before_any_data_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ddpm_ema.errors import UserError
    from ddpm_ema.train.trainer import check_capabilities

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"training\.compile: torch\.compile needs a C"):
        check_capabilities(settings(tmp_path / "run", training__compile=True))


def test_an_unknown_tracker_is_an_error_that_lists_those_there_are(tmp_path: Path) -> None:
    launch = start(settings(tmp_path / "run", training__trackers=["tensorbord"]))
    assert launch.wait() == [2]
    assert "tensorboard" in launch.output()


@pytest.mark.parametrize("step", [7, 200, 300, 12_345])
def test_the_weighting_that_a_manifest_carries_is_a_smooth_density_at_any_step(step: int) -> None:
    from ddpm_ema import PowerFunction, Uniform
    from ddpm_ema.train.state import weighting_points

    assert weighting_points(Uniform(), step) == pytest.approx([1.0] * 200)
    points = weighting_points(PowerFunction(std=0.1), step)
    assert sum(points) / 200 == pytest.approx(1.0)
    rises = [after - before for before, after in itertools.pairwise(points)]
    assert min(rises) >= -1e-9, "a power function only rises"
