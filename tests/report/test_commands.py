"""The commands that the page prints: each runs as printed and repeats the settings of its scoring."""

from __future__ import annotations

import shlex
from pathlib import Path

import fake_run
import pytest
import yaml

from ddpm_ema import config, report
from ddpm_ema.report import commands
from ddpm_ema.report.answer import named
from ddpm_ema.report.reading import read


def parsed(command: str, stage: str) -> config.Config:
    """The settings that a printed command line gives to a stage."""
    program, name, *arguments = shlex.split(command)
    assert (program, name) == ("ddpm-ema", stage)
    return config.parse(arguments)


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A run that lies in another place than its config.yaml says, scored by other settings than those of training."""
    run = fake_run.make_run(tmp_path / "it's $(touch x)" / "digits")
    odd = fake_run.evaluation(mixed_precision="bf16", guidance_scale=1e-5, reference="test", steps=[3000], seed=2)
    odd |= {
        "extractors": ["no", "timm:vit=a b.safetensors"],
        "weights": ["raw", "runs/ä b #1: [x]", "raw+ema_0_999"],
        "clip_sample": False,
    }
    odd["sweep"] = {**odd["sweep"], "decays": "0.9:0.99:3", "num_images": 100}
    fake_run.write_results(run, fake_run.results(evaluation=odd, finished="2026-01-01T00:00:00Z"), digest="odd")
    return run


def test_a_printed_command_repeats_the_settings_of_the_scoring_in_the_folder_as_it_lies_now(copied: Path) -> None:
    record = read(copied)
    for scoring in record.scorings:
        wanted = dict(scoring.evaluation)
        if scoring.step != fake_run.STEPS:
            wanted["steps"] = [scoring.step]
        for command, changes in (
            (commands.score(record, scoring), {}),
            (commands.sweep(record, scoring), {"sweep": {**wanted["sweep"], "stds": "0.02:0.25:12"}}),
            (commands.score(record, scoring, steps="all"), {"steps": "all"}),
        ):
            found = parsed(command, "score")
            assert config.to_dict(found)["evaluation"] == {**wanted, **changes}
            assert found.output_dir == copied
    assert parsed(commands.train(record), "train").output_dir == copied


@pytest.mark.parametrize("text", ["--model.factory=x:y", "\u202ex"])
def test_a_text_of_a_scoring_becomes_no_option_of_a_command(text: str, copied: Path) -> None:
    results = fake_run.results(evaluation=fake_run.evaluation(weights=["raw", text]), finished="2026-01-02T00:00:00Z")
    fake_run.write_results(copied, results, digest="worse")
    record = read(copied)
    words = shlex.split(commands.score(record, named(record.scorings, "worse")))
    assert text not in words
    assert f'"{text}"'.encode("unicode_escape").decode() in words


def test_a_printed_command_says_no_more_than_it_must(copied: Path) -> None:
    record = read(copied)
    run = shlex.quote(str(copied))
    assert commands.sweep(record, record.scorings[-2]) == (
        f"ddpm-ema score {run} --evaluation.num-images 6000 --evaluation.sampler dpm_solver++ --evaluation.num-inference-steps 25 "
        "--evaluation.extractors classifier --evaluation.sweep.stds 0.02:0.25:12"
    )


def test_all_averages_are_named_where_the_run_itself_says_fewer(tmp_path: Path) -> None:
    run = fake_run.make_run(tmp_path / "run")
    settings = fake_run.settings()
    settings["evaluation"]["weights"] = ["raw"]
    (run / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    record = read(run)
    found = parsed(commands.score(record, record.scorings[-1]), "score")
    assert found.evaluation.weights == ("raw", *fake_run.AVERAGES)
    del settings["evaluation"]["weights"]  # an empty list has no spelling on the command line, and needs none
    (run / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    assert parsed(commands.score(read(run), record.scorings[-1]), "score").evaluation.weights == ()


def test_the_feature_classifier_is_trained_first_where_it_is_missing(copied: Path) -> None:
    record = read(copied)
    assert "features" not in commands.sweep(record, record.scorings[0])
    (copied / "features.safetensors").unlink()
    first, second = commands.sweep(record, record.scorings[0]).split("\n")
    assert parsed(first, "features").output_dir == copied
    assert parsed(second, "score").output_dir == copied
    given = named(record.scorings, "odd")  # has a file of its own
    assert "features" not in commands.sweep(record, given)


def test_what_is_recommended_can_be_exported_as_printed_though_only_a_sweep_scored_it(tmp_path: Path) -> None:
    run = fake_run.make_run(tmp_path / "run")
    assert f"ddpm-ema export {run} power_0_10@3000" in report.write(run)[0].read_text()
    fake_run.write_results(run, fake_run.results(4000, **fake_run.swept(), may_be_best=["power_0_14"]))
    assert f"ddpm-ema export {run} power_0_14@4000" in report.write(run)[0].read_text()
    record = read(run)
    for name in ("raw+ema", "/models/x", "--help", "a b"):
        assert commands.export(record, record.scorings[0], name) == ""
    assert commands.export(record, record.scorings[0], "raw@7").endswith(" raw@7")
