"""Where a run goes on, what its settings may change, and what it refuses."""

import signal
from pathlib import Path
from typing import Any

import pytest
from live_runs import TINY, assert_bit_equal, exact, rows, settings, start, state, wait_for_row
from PIL import Image

from ddpm_ema import config, train
from ddpm_ema.errors import UserError
from ddpm_ema.rundir import RunDir


def refusal(run: config.Config) -> str:
    with pytest.raises(UserError) as refused:
        train.run(run)
    return str(refused.value)


def test_a_finished_run_says_so_and_rewrites_nothing(tmp_path: Path, capsys) -> None:
    run = settings(tmp_path / "run", training__steps=4)
    train.run(run)
    before = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in run.output_dir.rglob("*") if p.name != ".lock"}
    train.run(run)
    assert "already complete at step 4" in capsys.readouterr().err
    folders = {p: v for p, v in before.items() if p.is_file()}
    assert folders == {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in folders}


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
    uninterrupted: config.Config, changes: dict[str, Any], expected: str
) -> None:
    run = settings(uninterrupted.output_dir, training__steps=60, **changes)
    assert expected in refusal(run)
    assert RunDir(run.output_dir).newest_whole()[0].step == 40


def test_an_average_added_on_resume_starts_at_the_raw_weights_when_a_setting_allows_it(tmp_path: Path) -> None:
    train.run(settings(tmp_path / "run", training__steps=4))
    averages = {**TINY["averages"], "late": {"kind": "constant", "decay": 1.0}}
    refused = refusal(settings(tmp_path / "run", training__steps=8, averages=averages))
    assert "averages.late: is new (--training.allow-new-averages" in refused
    run = settings(tmp_path / "run", training__steps=8, averages=averages, training__allow_new_averages=True)
    train.run(run)
    rundir = RunDir(run.output_dir)
    assert_bit_equal(rundir.checkpoint(4).weights("raw"), rundir.checkpoint(8).weights("late"))


def test_another_batch_size_goes_on_when_a_setting_allows_it(tmp_path: Path) -> None:
    train.run(settings(tmp_path / "run", training__steps=4))
    run = settings(tmp_path / "run", training__steps=6, training__batch_size=8, training__allow_batch_size_change=True)
    train.run(run)
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4, 5, 6]


def test_another_data_set_on_resume_is_refused_with_both_names(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(20):
        Image.new("L", (8, 8), number * 10).save(folder / f"{number}.png")
    train.run(settings(tmp_path / "run", training__steps=4))
    refused = refusal(settings(tmp_path / "run", training__steps=8, data__source="folder", data__path=str(folder)))
    assert "digits (1797 images" in refused
    assert "(20 images" in refused


def test_when_every_checkpoint_is_bad_it_refuses_to_start_over_and_names_the_flag_that_does(tmp_path: Path) -> None:
    run = settings(tmp_path / "run")
    train.run(run)
    for checkpoint in RunDir(run.output_dir).checkpoints():
        path = checkpoint.path / "raw.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    assert "--training.resume fresh" in refusal(run)
    fresh = settings(tmp_path / "run", training__resume="fresh")
    train.run(fresh)
    assert (run.output_dir / "previous-1" / "checkpoints").is_dir()
    assert len(rows(fresh)) == 12


def test_a_bad_newest_checkpoint_is_passed_over_with_one_warning(
    uninterrupted: config.Config, tmp_path: Path, capsys
) -> None:
    run = settings(tmp_path / "run", training__steps=40)
    train.run(settings(tmp_path / "run", training__steps=14))
    newest = RunDir(run.output_dir).checkpoints()[-1]
    path = newest.path / "optimizer.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    train.run(run)
    said = capsys.readouterr().err
    assert said.count("passed over a checkpoint") == 1
    assert f"{path}: sha256 mismatch" in said
    assert_bit_equal(state(run), state(uninterrupted))
    assert exact(run) == exact(uninterrupted)


def test_never_refuses_a_used_folder(tmp_path: Path) -> None:
    train.run(settings(tmp_path / "run", training__steps=4))
    refused = refusal(settings(tmp_path / "run", training__steps=8, training__resume="never"))
    assert "training.resume is never" in refused


def test_a_folder_whose_checkpoints_are_gone_is_refused_and_fresh_keeps_everything(tmp_path: Path) -> None:
    changes = {"checkpoints__snapshots_every": 4, "training__steps": 12, "checkpoints__every": 12}
    train.run(settings(tmp_path / "run", **changes))
    (tmp_path / "run" / "checkpoints").rename(tmp_path / "elsewhere")  # or a link to a disk that is not mounted
    before = sorted(p for p in (tmp_path / "run").rglob("*") if p.name != ".lock")
    for resume, expected in (
        ("auto", "holds no checkpoint, but metrics or snapshots up to step 12"),
        ("never", "never"),
    ):
        assert expected in refusal(settings(tmp_path / "run", **changes, training__resume=resume))
    assert sorted(p for p in (tmp_path / "run").rglob("*") if p.name != ".lock") == before
    (tmp_path / "run" / "checkpoints").mkdir()
    assert "holds no checkpoint" in refusal(settings(tmp_path / "run", **changes | {"checkpoints__every": 6}))
    train.run(settings(tmp_path / "run", **changes, training__resume="fresh"))
    aside = tmp_path / "run" / "previous-1"
    assert len(list(aside.rglob("*.safetensors"))) == sum(p.suffix == ".safetensors" for p in before)
    assert len(rows(aside)) == 12


def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path: Path) -> None:
    run = settings(tmp_path / "run", training__steps=12, checkpoints__every=8, checkpoints__snapshots_every=2)
    train.run(run)
    (run.output_dir / "checkpoints").rename(tmp_path / "elsewhere")
    (run.output_dir / "checkpoints").mkdir()
    rows_left = run.output_dir.joinpath("metrics.jsonl")
    rows_left.write_text("".join(rows_left.read_text().splitlines(keepends=True)[:7]))  # as if killed at step 7
    for folder in (run.output_dir / "snapshots").glob("step-*"):
        if int(folder.name[5:]) > 7:
            folder.rename(tmp_path / folder.name)
    train.run(run)
    assert [row["step"] for row in rows(run.output_dir)] == list(range(1, 13))


def test_fresh_moves_nothing_until_the_new_settings_hold_and_only_once_in_a_requeued_job(
    uninterrupted: config.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train.run(settings(tmp_path / "run", training__steps=4))
    unlabelled = tmp_path / "images"
    unlabelled.mkdir()
    for index in range(16):
        Image.new("L", (8, 8), index).save(unlabelled / f"{index}.png")
    bad = {"data": {"source": "folder", "path": str(unlabelled), "image_size": 8, "channels": 1}}
    assert refusal(settings(tmp_path / "run", **bad, model__class_conditional=True, training__resume="fresh"))
    assert not list((tmp_path / "run").glob("previous-*"))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # its node failed before it began: the old run is not the job's
    train.run(settings(tmp_path / "run", training__steps=3, training__resume="fresh"))
    assert (tmp_path / "run" / "previous-1" / "metrics.jsonl").is_file()
    for count in "23":
        monkeypatch.setenv("SLURM_RESTART_COUNT", count)
        train.run(settings(tmp_path / "run", training__steps=3 * int(count), training__resume="fresh"))  # goes on
    assert not (tmp_path / "run" / "previous-2").exists()
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, 10))
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    train.run(settings(tmp_path / "run", training__steps=4, training__resume="fresh"))
    assert (tmp_path / "run" / "previous-2" / "metrics.jsonl").is_file()
    assert config.load(tmp_path / "run" / "config.yaml").training.resume == "auto", "fresh was said once, not for ever"


def test_a_second_run_in_the_same_folder_is_refused_on_every_rank(tmp_path: Path) -> None:
    run = settings(tmp_path / "run", training__steps=400, checkpoints__every=1000)
    first = start(run)
    wait_for_row(run, 2)
    second = start(run, 2)
    assert second.wait() == [2, 2]
    assert f"process {first.processes[0].pid} on host" in second.output()
    first.signal(signal.SIGTERM)
    assert first.wait() == [75]


def test_resume_and_fallback_keep_the_snapshot_of_the_initial_weights_and_write_the_later_ones_anew(
    tmp_path: Path,
) -> None:
    run = settings(tmp_path / "run", training__steps=12, checkpoints__snapshots_every=2)
    train.run(run)
    rundir = RunDir(run.output_dir)
    stored = {path: path.read_bytes() for paths in rundir.snapshots().values() for path in paths}
    assert rundir.snapshot_path(0, "raw") in stored
    (rundir.checkpoint(12).path / "raw.safetensors").write_bytes(b"")
    train.run(run)
    assert {path: path.read_bytes() for paths in rundir.snapshots().values() for path in paths} == stored
