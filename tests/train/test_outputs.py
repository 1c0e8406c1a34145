"""What a run logs and stores: rows, averages of the raw weights of every step, snapshots."""

import itertools
from pathlib import Path

import pytest
import torch
from live_runs import assert_bit_equal, finish, rows, settings, state
from PIL import Image

from ddpm_ema import PowerFunction, StochasticWeightAverage, Uniform, config, model, train
from ddpm_ema.averaging import RAW, Snapshot
from ddpm_ema.config import TrainingSettings
from ddpm_ema.errors import UserError
from ddpm_ema.rundir import RunDir, read_tensors
from ddpm_ema.train.checkpointing import weighting_points


def test_rows_say_what_a_person_needs_to_know(uninterrupted: config.Config) -> None:
    row = rows(uninterrupted)[-1]
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
    tmp_path: Path, capsys
) -> None:
    averages = {
        "ema_0_9999": {"kind": "constant", "decay": 0.9999},
        "last_half": {"kind": "window", "length": "50%", "end": "100%"},
    }
    run = settings(tmp_path / "run", training__steps=6, checkpoints__every=1, averages=averages)
    train.run(run)
    table = capsys.readouterr().err.split("initial weights\n")[1].splitlines()
    assert table[0].split() == ["ema_0_9999", "10,000", "6", "0.0%", "99.9%"]
    assert table[1].split() == ["last_half", "-", "3", "83.3%", "0.0%"]
    assert table[2].startswith("warning: ema_0_9999 will still hold 100% of the initial weights after 6 steps: use")
    last = RunDir(run.output_dir).checkpoint(6)
    assert last.manifest["profiles"]["last_half"] == {"kind": "window", "length": 3, "end": 6}
    raw = [RunDir(run.output_dir).checkpoint(step).weights("raw") for step in (4, 5, 6)]
    for name, mean in last.weights("last_half").items():
        assert torch.allclose(mean, sum(weights[name] for weights in raw) / 3, rtol=1e-5, atol=1e-7)


def initial_weights(run: config.Config) -> dict[str, torch.Tensor]:
    return dict(model.build(run, 10).state_dict())


def test_a_run_says_before_its_first_step_which_intervals_are_void_which_images_it_skips_and_what_scoring_will_lack(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for index in range(16):
        Image.new("L", (8, 8), index).save(images / f"{index}.png")
    (images / "broken.png").write_bytes(b"no image")
    data = {"source": "folder", "path": str(images), "image_size": 8, "channels": 1, "max_bad_images": 1}
    intervals = {"checkpoints__every": 5, "checkpoints__snapshots_every": 6, "training__sample_every": 7}
    train.run(settings(tmp_path / "run", training__steps=4, training__warmup_steps=2, data=data, **intervals))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert [line.split()[1] for line in said if "more than training.steps, 4" in line] == [
        "training.sample_every:",
        "checkpoints.every:",
        "checkpoints.snapshots_every:",
    ]
    assert any("skipped image: " in line and "broken.png" in line for line in said)
    assert any("scoring will need" in line and "classifier=FILE" in line for line in said)


def test_a_typo_in_the_extractor_is_an_error_before_training(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no extractor is called 'clasifier'; did you mean 'classifier'\?"):
        train.run(settings(tmp_path / "run", evaluation__extractors=["clasifier"]))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_averages_are_those_of_the_raw_weights_at_every_step(tmp_path: Path) -> None:
    """Saved at every step, the raw weights give the averages anew in float64, by the profile alone."""
    run = settings(tmp_path / "run", training__steps=9, checkpoints__every=1, checkpoints__keep=100)
    train.run(run)
    checkpoints = RunDir(run.output_dir).checkpoints()
    assert [c.step for c in checkpoints] == list(range(1, 10))
    for name, profile in run.averages.items():
        average = {key: value.double() for key, value in initial_weights(run).items()}
        for checkpoint in checkpoints:
            decay = profile.decay(checkpoint.step)
            for key, value in checkpoint.weights("raw").items():
                average[key] = decay * average[key] + (1 - decay) * value.double()
        saved = checkpoints[-1].weights(name)
        for key, value in average.items():
            assert torch.allclose(saved[key].double(), value, rtol=0, atol=1e-6), (name, key)


def test_snapshots_are_of_what_was_named_and_of_the_initial_weights_once(tmp_path: Path) -> None:
    averages = {
        "ema": {"kind": "constant", "decay": 0.9},
        "wide": {"kind": "uniform"},
        "p": {"kind": "power_function", "std": 0.1},
    }
    chosen = {"averages": averages, "checkpoints__snapshots_every": 4, "checkpoints__every": 8, "training__steps": 8}
    run = settings(tmp_path / "run", **chosen, checkpoints__snapshots=["raw", "ema"])
    finish(run, 2)
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


def test_a_step_that_fp16_skipped_moves_no_average_and_is_counted(tmp_path: Path, overflowing_twice: None) -> None:
    """As many optimizer steps as completed ones: Adam's own count, the averages' step and the rows agree."""
    run = settings(tmp_path / "run", training__mixed_precision="fp16", training__steps=8)
    train.run(run)
    skipped = [row["skipped_steps"] for row in rows(run)]
    assert skipped[-1] >= 2
    assert [row["step"] for row in rows(run)] == list(range(1, 9))
    tensors = state(run)
    assert {float(t) for key, t in tensors.items() if ":step/" in key} == {8.0}
    plain = settings(tmp_path / "plain", training__steps=8)
    train.run(plain)
    for key, tensor in state(plain).items():  # the same stream: a skipped step is tried again with the same images
        if key.startswith("raw"):
            assert torch.allclose(tensor, tensors[key], atol=2e-2), key


@pytest.mark.parametrize("step", [7, 200, 300, 12_345])
def test_the_weighting_that_a_manifest_carries_is_a_smooth_density_at_any_step(step: int) -> None:
    assert weighting_points(Uniform(), step) == pytest.approx([1.0] * 200)
    points = weighting_points(PowerFunction(std=0.1), step)
    assert sum(points) / 200 == pytest.approx(1.0)
    rises = [after - before for before, after in itertools.pairwise(points)]
    assert min(rises) >= -1e-9, "a power function only rises"


def test_learning_rate_schedules_are_hand_computed_tables() -> None:
    def table(steps: int, at: list[int], **changes: object) -> list[float]:
        given = TrainingSettings(steps=steps, learning_rate=1.0, **changes)
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
