"""One optimizer step from inside: what the network is shown, what is logged, and that nothing unchecked reaches a file."""

import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from live_runs import assert_bit_equal, exact, rows, settings, state
from torch import Tensor

from ddpm_ema import capabilities, train
from ddpm_ema.config import Config
from ddpm_ema.distributed import Processes
from ddpm_ema.errors import DivergedError, UserError
from ddpm_ema.rundir import RunDir
from ddpm_ema.train import step
from ddpm_ema.train.metrics_log import RunningMeans
from ddpm_ema.train.trainer import MicroBatch, Trainer, build


def trainer_of(run: Config) -> Trainer:
    return build(run, Processes.start("cpu"), RunDir(run.output_dir))


def micro_batch_of(trainer: Trainer, first: int, last: int) -> MicroBatch:
    """Positions `first` to `last` of a global batch that takes the images in their order."""
    indices = torch.arange(first, last)
    return MicroBatch(indices, indices, trainer.dataset.batch(indices))


def shown(trainer: Trainer, first: int, last: int) -> tuple[Tensor, Tensor | None]:
    """(x_0, labels) that the objective gets at these positions of the trainer's step."""
    seen: list[tuple[Tensor, Tensor | None]] = []

    def loss(_: object, x_0: Tensor, noise: Tensor, timesteps: Tensor, labels: Tensor | None) -> Tensor:
        seen.append((x_0, labels))
        return x_0.flatten(1).mean(1)

    trainer.objective.loss = loss
    step.image_losses(trainer, micro_batch_of(trainer, first, last))
    return seen[0]


def test_with_horizontal_flip_half_of_the_images_are_mirrored_anew_at_every_step(tmp_path: Path) -> None:
    trainer = trainer_of(settings(tmp_path / "run", data__horizontal_flip=True))
    images = trainer.dataset.batch(torch.arange(400)).float() / 127.5 - 1
    flips = []
    for trainer.step in (0, 1):
        x_0, _ = shown(trainer, 0, 400)
        mirrored = (x_0 == images.flip(-1)).flatten(1).all(1)
        assert torch.equal(x_0, torch.where(mirrored[:, None, None, None], images.flip(-1), images))
        assert float(mirrored.double().mean()) == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(400))
        flips.append(mirrored)
        assert torch.equal(shown(trainer, 100, 150)[0], x_0[100:150]), "by position, whatever the micro-batch"
    assert not torch.equal(flips[0], flips[1])


def test_without_horizontal_flip_every_image_is_shown_as_it_is(tmp_path: Path) -> None:
    trainer = trainer_of(settings(tmp_path / "run"))
    assert torch.equal(shown(trainer, 0, 400)[0], trainer.dataset.batch(torch.arange(400)).float() / 127.5 - 1)


def test_a_class_conditional_network_is_shown_the_labels_but_those_that_are_dropped(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"model__class_conditional": True, "diffusion__label_dropout": 0.3}
    trainer = trainer_of(settings(tmp_path / "run", **changes))
    _, labels = shown(trainer, 0, 400)
    dropped = labels == 10
    assert torch.equal(labels[~dropped], trainer.dataset.labels[:400][~dropped])
    assert float(dropped.double().mean()) == pytest.approx(0.3, abs=5 * math.sqrt(0.3 * 0.7 / 400))
    trainer.step = 1
    assert not torch.equal(shown(trainer, 0, 400)[1] == 10, dropped)


def test_tries_that_fp16_skipped_are_not_in_the_logged_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overflowing_twice: None
) -> None:
    tries: list[Tensor] = []
    image_losses = step.image_losses

    def noted(*arguments: Any) -> tuple[Tensor, Tensor]:
        loss, timesteps = image_losses(*arguments)
        tries.append(loss.detach())
        return loss, timesteps

    monkeypatch.setattr(step, "image_losses", noted)
    trainer = trainer_of(settings(tmp_path / "run", training__mixed_precision="fp16"))
    moved, skipped = [], 0
    while trainer.step < 3:
        if step.train_step(trainer, [micro_batch_of(trainer, 0, 16)]):
            moved.append(tries[-1])
        else:
            skipped += 1
    assert skipped >= 2
    row = trainer.means.means(trainer.processes)
    assert row["loss"] == pytest.approx(float(torch.cat(moved).double().mean()), rel=1e-12)


def row_of(means: list[RunningMeans]) -> dict[str, float | None]:
    """The row that so many processes, each with its means, write together."""
    total = torch.stack([one.sums for one in means]).sum(0)
    processes: Any = SimpleNamespace(world_size=len(means), sum_=lambda _: total)
    return means[0].means(processes)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3)])
def test_a_row_that_spans_a_change_in_the_number_of_processes_has_the_means_of_all_its_steps(
    before: int, after: int
) -> None:
    """Every process counts each step and its norm once, and the losses of its own images."""
    means = [RunningMeans(torch.device("cpu"), 100) for _ in range(before)]
    for rank, one in enumerate(means):
        for norm in (1.0, 3.0):
            one.add_step(torch.tensor(norm))
            one.add_losses(torch.tensor([0.5 + rank, 0.7]), torch.tensor([10, 90]))
    state = [one.sums.tolist() for one in means]
    expected = row_of(means)
    resumed = [RunningMeans(torch.device("cpu"), 100) for _ in range(after)]
    for rank, one in enumerate(resumed):
        processes: Any = SimpleNamespace(rank=rank, world_size=after, is_main=rank == 0)
        one.load(state, processes)
        one.add_step(torch.tensor(5.0))
    row = row_of(resumed)
    assert row.pop("grad_norm") == pytest.approx((1 + 3 + 5) / 3)
    assert expected.pop("grad_norm") == pytest.approx(2)
    assert row == pytest.approx(expected)


def test_a_run_that_was_extended_is_bit_equal_to_one_that_was_long_from_the_start(tmp_path: Path) -> None:
    """The row at a last step between two rows is of steps that the next row counts too; going on takes it back."""
    whole = settings(tmp_path / "whole", training__steps=12, training__log_every=5)
    train.run(whole)
    short = settings(tmp_path / "run", training__steps=7, training__log_every=5)
    train.run(short)
    assert [(row["step"], row.get("partial")) for row in rows(short)] == [(5, None), (7, True)]
    longer = settings(tmp_path / "run", training__steps=12, training__log_every=5)
    train.run(longer)
    assert [row["step"] for row in rows(longer)] == [5, 10, 12]
    assert exact(longer) == exact(whole)
    assert_bit_equal(state(longer), state(whole))


# What is made of the weights after some steps, each alone: nothing else in the run then reads the checks in time.
DUE_AT_STEP_6 = {
    "a row of metrics": {"training__log_every": 6},
    "a checkpoint": {"checkpoints__every": 6},
    "the last checkpoint": {"training__steps": 6},
    "a snapshot": {"checkpoints__snapshots_every": 6},
    "a grid": {"training__sample_every": 6},
    "a quick scoring": {"evaluation__every": 6},
    "a stop": {},
    "nothing": {},
}


def late(tensor: Tensor) -> tuple[Tensor, Callable[[], bool]]:
    """A copy to the host that holds something finite until it has arrived, as `to_host` on CUDA gives."""
    copy, answers = torch.zeros_like(tensor), iter([False, False, True])

    def has_arrived() -> bool:
        if arrived := next(answers):
            copy.copy_(tensor)
        return arrived

    return copy, has_arrived


@pytest.mark.parametrize("due", DUE_AT_STEP_6)
def test_where_checks_are_read_late_as_on_cuda_nothing_unchecked_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, due: str
) -> None:
    """The weights are not finite from step 6 on; the checks are read two steps late, or before anything is kept."""
    changes = DUE_AT_STEP_6[due]
    image_losses = step.image_losses

    def poisoned(trainer: Trainer, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
        loss, timesteps = image_losses(trainer, micro_batch)
        if due == "a stop" and trainer.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return (loss * torch.nan if trainer.step == 5 else loss), timesteps

    monkeypatch.setattr(step, "image_losses", poisoned)
    monkeypatch.setitem(step.CHECK_LAG, "cpu", step.CHECK_LAG["cuda"])
    monkeypatch.setattr(step, "to_host", late)
    scored: list[int] = []
    common = {"training__log_every": 100, "checkpoints__every": 100}
    run = settings(tmp_path / "run", **{**common, **changes})
    with pytest.raises(DivergedError, match=r"step 6: .*Nothing after step 5 was saved"):
        train.run(run, lambda *_: lambda number, weights: scored.append(number) or [])
    assert scored == []
    assert rows(run) == []
    kept = {path.relative_to(run.output_dir).as_posix() for path in run.output_dir.rglob("*") if path.is_file()}
    assert kept - {"snapshots/step-00000000/raw.safetensors"} == {".lock", "config.yaml"}


@pytest.mark.parametrize("stage", ["training", "evaluation"])
def test_bf16_is_refused_on_a_gpu_that_only_emulates_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    changes = {"machine__device": "auto", f"{stage}__mixed_precision": "bf16"}
    run = settings(tmp_path / "run", **changes)
    with pytest.raises(UserError, match=rf"{stage}\.mixed_precision: this GPU has no bf16"):
        capabilities.check(stage, getattr(run, stage), run.machine)
