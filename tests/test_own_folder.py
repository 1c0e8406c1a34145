"""`ddpm-ema train --data.path FOLDER` alone: settings that fit the images and the machine, and what they would take."""

import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ddpm_ema import cli, config, own_folder
from ddpm_ema.errors import EXIT_BAD_INPUT, EXIT_DONE
from ddpm_ema.train.dry_run import length


def photo(width: int, height: int, grey: bool = False, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 1 if grey else 3), dtype=np.uint8)
    return Image.fromarray(np.broadcast_to(pixels, (height, width, 3)).copy()).convert(mode)


def chosen(
    images: list[Image.Image], count: int = 1000, classes: str = "no classes", on_gpu: bool = False, **given: str
):
    overrides = {key.replace("__", "."): [value] for key, value in given.items()}
    tree, words = own_folder.choose(images, count, classes, on_gpu, overrides)
    return config.load({**tree, "data": {**tree["data"], "path": "photos"}}, overrides), words


def test_photographs_are_cut_to_a_power_of_two_that_a_cpu_can_train() -> None:
    settings, words = chosen([photo(96, 72), photo(640, 480)], classes="2 classes (cat, dog)")
    assert (settings.data.image_size, settings.data.channels, settings.data.horizontal_flip) == (32, 3, True)
    assert settings.model.block_out_channels == (32, 64, 64)
    assert settings.evaluation.extractors == ("classifier",)
    assert words == "1,000 colour images, shorter side 72 to 480 pixels, 2 classes (cat, dog)"


@pytest.mark.parametrize("mode", ["L", "RGB", "1"])
def test_grey_images_have_one_channel_whatever_their_files_say_and_are_not_mirrored(mode: str) -> None:
    settings, _ = chosen([photo(28, 28, grey=True, mode=mode)])
    assert (settings.data.image_size, settings.data.channels, settings.data.horizontal_flip) == (28, 1, False)
    assert settings.model.attention == (False, False, True)  # 28, 14 and 7 pixels


def test_no_two_large_images_are_held_beside_the_one_that_is_looked_at() -> None:
    def images() -> Iterator[Image.Image]:
        seen: list[weakref.ref[Image.Image]] = []
        for _ in range(4):
            assert sum(image() is not None for image in seen) <= 1
            image = photo(40, 30)
            seen.append(weakref.ref(image))
            yield image
            del image

    assert own_folder.choose(images(), 4, "no classes", False, {})[1].startswith("4 colour images, shorter side 30")


def test_a_gpu_gets_the_papers_network_and_the_images_whole() -> None:
    settings, _ = chosen([photo(32, 32)], on_gpu=True)
    assert settings.model == config.Config().model
    settings, _ = chosen([photo(64, 64)], on_gpu=True)
    assert settings.data.image_size == 64
    assert settings.model.attention == (False, False, True, False, False)


def test_an_image_size_that_was_asked_for_gets_a_network_that_fits() -> None:
    settings, _ = chosen([photo(640, 480)], data__image_size="64")
    assert settings.data.image_size == 64
    assert settings.model.block_out_channels == (32, 64, 64, 64)


def test_a_few_images_make_one_batch_and_intervals_are_shares_of_whatever_steps_there_are() -> None:
    settings, _ = chosen([photo(16, 16)], count=40, training__steps="200")
    assert settings.training.batch_size == 32
    assert (settings.checkpoints.every, settings.training.sample_every, settings.training.warmup_steps) == (10, 50, 10)


def test_a_run_longer_than_an_hour_is_told_the_steps_of_one() -> None:
    assert length(3000, 4.5).endswith("; --training.steps 800 takes an hour")
    assert length(100, 4.5) == "100 steps, 7:30 without saving and sampling"
    assert "hour" not in length(2, 4000.0)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with grey images of two classes."""
    for index in range(40):
        path = tmp_path / "shapes" / ("round" if index % 2 else "square") / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(8 + index % 2, 8, grey=True, mode="L").save(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


SHORT = ["--training.steps", "4", "--training.sample_every", "0", "--machine.device", "cpu"]


def test_a_dry_run_says_what_a_run_takes_and_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(folder.rglob("*"))
    command = ["train", "--data.path", "shapes", "--dry-run", "--training.steps", "400"]
    assert cli.main([*command, "--checkpoints.keep_every", "100"]) == EXIT_DONE
    said = capsys.readouterr()
    assert sorted(folder.rglob("*")) == before
    settings = config.validate(yaml.safe_load(said.out))
    assert (settings.data.image_size, settings.training.steps, str(settings.output_dir)) == (8, 400, "runs/shapes")
    words = {line.split("  ")[0]: " ".join(line.split()) for line in said.err.splitlines()}
    weights = 4 * int(words["parameters"].split()[1].replace(",", "")) / 2**20
    assert words["epoch"] == "epoch 1.2 steps; the run sees each image 320.0 times"
    assert words["checkpoint"] == f"checkpoint {8 * weights:.1f} MiB (raw, two moments, 5 averages); 5 kept at the end"
    assert words["snapshots"].startswith(f"snapshots {61 * weights:.1f} MiB: 20 of 3 averages and the first weights")
    assert words["optimizer"].split()[1::2] == [f"{2 * weights:.1f}"] * 3
    assert words["uniform"].endswith("MiB")  # below the table of what the averages mean
    assert f"{weights:.1f} MiB {weights / 2:.1f} MiB {weights / 8:.1f} MiB" in words["uniform"]
    assert float(words["step"].split()[1]) > 0
    assert words["intervals"].startswith(
        "intervals 100 rows of metrics (every 4 steps), 20 checkpoints (every 20 steps)"
    )
    assert words["version"].startswith("version ddpm_ema ")
    assert f"torch {torch.__version__}" in words["version"]


def test_a_run_of_a_folder_keeps_its_settings_and_goes_on_with_them(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", "--data.path", "shapes", *SHORT]) == EXIT_DONE
    said = capsys.readouterr().err
    assert "40 grey images, shorter side 8 pixels, 2 classes (round, square); settings chosen" in said
    assert "step 4 of 4: loss " in said
    assert "\r" not in said
    kept = yaml.safe_load((folder / "runs/shapes/config.yaml").read_text())
    assert kept["data"]["path"] == "shapes"
    for index in range(100):  # with more images other settings would be chosen
        photo(64, 64).save(folder / "shapes" / "round" / f"more-{index}.png")
    assert cli.main(["train", "--data.path", "shapes"]) == EXIT_DONE
    said = capsys.readouterr().err
    assert "the settings are those of runs/shapes/config.yaml" in said
    assert "already complete at step 4" in said
    assert "is a run of" not in said
    (folder / "other").mkdir()
    (folder / "shapes").rename(folder / "other" / "shapes")
    assert cli.main(["train", "--data.source", "folder", "--data.path", "other/shapes"]) == EXIT_DONE
    assert "warning: runs/shapes is a run of shapes, not of other/shapes; for a new run" in capsys.readouterr().err
    (folder / "runs/shapes/config.yaml").write_text("data: {source: digits}\n")
    assert cli.main(["train", "--data.path", "other/shapes"]) == EXIT_BAD_INPUT
    assert "warning: runs/shapes is a run of digits, not of other/shapes; for a new run" in capsys.readouterr().err
