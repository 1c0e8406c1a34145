"""What ends a run: one message, the right exit code, and nothing kept that is not finite."""

import shutil
import threading
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker
from live_runs import finish, rows, settings, start, state
from PIL import Image

from ddpm_ema import config, train
from ddpm_ema.batch_order import batch_indices
from ddpm_ema.errors import DivergedError, UserError
from ddpm_ema.rundir import RunDir
from ddpm_ema.train import checkpointing, preview, step


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"machine__device": "cuda"}, r"machine\.device: cuda was asked for, and there is no CUDA device"),
        ({"machine__world_size": 2}, "2 processes were asked for, the launch gives 1"),
        ({"training__trackers": ["tensorbord"]}, "tensorbord unknown; accelerate knows .*tensorboard"),
        ({"training__compile": True}, r"training\.compile: torch\.compile needs a C"),
    ],
)
def test_what_this_machine_or_launch_cannot_do_is_an_error_before_any_data_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes, message
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("PATH", str(tmp_path))  # which holds no compiler
    run = settings(tmp_path / "run", data__source="folder", data__path="/nowhere", **changes)
    with pytest.raises(UserError, match=message):
        train.run(run)
    assert not run.output_dir.exists()


def test_fewer_images_than_a_batch_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="1797 images, fewer than one batch"):
        train.run(settings(tmp_path / "run", training__batch_size=2000))


def infinite_at_step_6() -> None:
    """One image's loss is infinite, on rank 1, in the sixth step, though its gradient is finite: its square overflowed."""
    poisoned_at_step_6(lambda loss, here: loss + torch.where(here, torch.inf, 0.0))


def poisoned_at_step_6(poison=lambda loss, here: loss * torch.where(here, torch.nan, 1.0)) -> None:
    """One image's loss is not a number, on rank 1, in the sixth step."""
    losses = step.image_losses

    def poisoned(trainer, micro_batch):
        loss, timesteps = losses(trainer, micro_batch)
        if trainer.step == 5 and trainer.processes.rank == 1:
            loss = poison(loss, torch.arange(len(loss)) == 2)
        return loss, timesteps

    step.image_losses = poisoned


@pytest.mark.parametrize("poisoned", [poisoned_at_step_6, infinite_at_step_6])
def test_a_loss_that_is_not_finite_stops_all_ranks_before_anything_moves(tmp_path: Path, poisoned) -> None:
    run = settings(tmp_path / "run")
    launch = start(run, 2, before=poisoned)
    assert launch.wait() == [3, 3]
    message = launch.output()
    image = int(batch_indices(0, 5, torch.tensor([8 + 2]), 16, 1797))
    assert f"step 6: rank 1: the loss of image {image} is not finite" in message
    assert "last checkpoint: step 4" in message
    assert "Traceback" not in message
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4, 5]
    assert all(torch.isfinite(tensor).all() for tensor in state(run).values())
    finish(run, 2)  # the poison gone, it goes on


def test_out_of_memory_says_what_to_lower_and_which_checkpoint_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = step.image_losses

    def hungry(trainer, micro_batch):
        if trainer.step == 5:
            torch.empty(2**50)  # as much as no machine has: the allocator itself refuses
        return losses(trainer, micro_batch)

    monkeypatch.setattr(step, "image_losses", hungry)
    with pytest.raises(UserError, match=r"lower training\.micro_batch_size .*last checkpoint: step 4"):
        train.run(settings(tmp_path / "run"))


def one_average_is_not_finite_where_it_is_shown() -> None:
    weights = preview.full_weights

    def broken(trainer, name):
        bad = name == "ema_0_9" and trainer.processes.rank == 1
        return {n: t * torch.nan if bad else t for n, t in weights(trainer, name).items()}

    preview.full_weights = broken


def scores_that_fail(run: config.Config) -> None:
    def evaluate(step, weights):
        raise UserError("ema_0_9: the pixels of image 0 are not finite")

    train.run(run, lambda *_: evaluate)


def test_samples_of_an_average_that_are_not_finite_cost_a_warning_and_training_goes_on(tmp_path: Path) -> None:
    """Shown or scored, on one rank or all: whoever left for the weekend wants the run."""
    run = settings(tmp_path / "run", training__sample_every=8, training__sample_images=4, evaluation__every=8)
    output = finish(run, 2, before=one_average_is_not_finite_where_it_is_shown, command=scores_that_fail).output()
    assert "warning: the sample grid of step 8 lacks ema_0_9: its images are not finite" in output
    assert "warning: step 8 has no quick scores: ema_0_9: the pixels of image 0 are not finite" in output
    with Image.open(RunDir(run.output_dir).sample_grid(8)) as picture:
        assert picture.height > 3 * 8, "the other rows are there"


def test_a_run_directory_that_is_moved_while_it_is_used_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, run = step.image_losses, settings(tmp_path / "run", checkpoints__every=100)

    def moving(trainer, micro_batch):
        if trainer.step == 5:
            run.output_dir.rename(tmp_path / "elsewhere")
        return losses(trainer, micro_batch)

    monkeypatch.setattr(step, "image_losses", moving)
    with pytest.raises(UserError, match=r"run: is no longer there; move it back and start again"):
        train.run(run)


def full_disk_at_second_save() -> None:
    usage, seen = shutil.disk_usage, []

    def full(path):
        seen.extend(["second save"] if "00000008" in str(path) else [])
        real = usage(path)
        return type(real)(real.total, real.total - 17, 17) if seen else real

    shutil.disk_usage = full


def test_a_disk_that_fills_up_ends_all_ranks_with_one_message(tmp_path: Path) -> None:
    run = settings(tmp_path / "run", training__steps=400, checkpoints__every=8, training__log_every=100)
    launch = start(run, 2, before=full_disk_at_second_save)
    assert launch.wait() == [2, 2]
    assert "the disk is full" in launch.output()
    assert "17 free" in launch.output()
    assert "Traceback" not in launch.output()


def test_a_write_that_failed_is_said_however_the_run_ends_and_the_last_whole_checkpoint_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    losses, write, diverged = step.image_losses, checkpointing._write, threading.Event()

    def poisoned(trainer, micro_batch):
        loss, timesteps = losses(trainer, micro_batch)
        return (loss * torch.nan if trainer.step == 9 else loss), timesteps

    def failing(rundir, number, *arguments):
        if number == 8:
            assert diverged.wait(60)
            raise UserError("the disk is full")
        write(rundir, number, *arguments)

    monkeypatch.setattr(step, "image_losses", poisoned)
    monkeypatch.setattr(step, "_why_diverged", lambda *a, why=step._why_diverged: diverged.set() or why(*a))
    monkeypatch.setattr(checkpointing, "_write", failing)
    with pytest.raises(DivergedError, match=r"step 10: .*last checkpoint: step 4"):
        train.run(settings(tmp_path / "run"))
    assert capsys.readouterr().err.count("warning: a write failed meanwhile: the disk is full") == 1


@pytest.mark.parametrize(("kind", "call"), [(Accelerator, "log"), (TensorBoardTracker, "finish")])
def test_a_tracker_that_is_down_costs_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, kind: type, call: str
) -> None:
    def fail(*_, **__):
        raise ConnectionError("server is down")

    monkeypatch.setattr(kind, call, fail)
    run = settings(tmp_path / "run", training__trackers=["tensorboard"])
    train.run(run)
    assert capsys.readouterr().err.count("warning: a tracker failed") == 1
    assert len(rows(run)) == 12
