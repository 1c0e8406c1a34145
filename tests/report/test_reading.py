"""What the report reads: a stranger's run directory harms nobody, and a real run is read without a warning."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import fake_run
import live_runs
import pytest
import scored
import yaml

from ddpm_ema import report, score
from ddpm_ema.errors import UserError
from ddpm_ema.features import Trained, save_classifier
from ddpm_ema.report.reading import read

SECRET = "-----BEGIN OPENSSH PRIVATE KEY-----"


def written(run: Path) -> str:
    return report.write(run)[0].read_text(encoding="utf-8")


def problems(run: Path) -> str:
    """What the report names as bad; the page is made all the same."""
    assert written(run)
    return "\n".join(read(run).problems)


NEAREST = f"scores/00003000-a/nearest/{hashlib.sha256(b'raw').hexdigest()[:16]}-16.png"


@pytest.mark.parametrize("place", ["config.yaml", "samples/step-00000500.png", "scores/00003000-a/grid.png"])
def test_what_lies_outside_the_run_directory_is_not_carried_away(tmp_path: Path, place: str) -> None:
    secret, run = tmp_path / "id_ed25519", tmp_path / "run"
    secret.write_bytes(b"\x89PNG\r\n\x1a\n" if place.endswith("png") else f"key: {SECRET}".encode())
    fake_run.write_results(run, fake_run.results(), digest="a")
    (run / place).parent.mkdir(exist_ok=True)
    (run / place).symlink_to(secret)
    page = written(run)
    assert f"{place} was skipped: it lies outside the run directory" in page
    assert SECRET not in page
    assert "data:image" not in page


def test_a_picture_is_embedded_only_if_it_is_a_png_and_a_text_only_if_it_is_settings(tmp_path: Path) -> None:
    folder = fake_run.write_results(tmp_path, fake_run.results(), digest="a")
    (folder / "grid.png").write_text(SECRET)
    (tmp_path / "config.yaml").write_text(SECRET)
    page = written(tmp_path)
    assert "scores/00003000-a/grid.png was skipped: it is not a PNG file" in page
    assert "config.yaml was skipped: it is not a mapping of settings" in page
    assert "data:image" not in page
    assert SECRET not in page


def test_nearest_training_images_are_embedded_by_the_rules_of_all_pictures(tmp_path: Path) -> None:
    folder = fake_run.write_results(tmp_path / "run", fake_run.results(), digest="a")
    fake_run.grid(folder / "grid.png")
    near = fake_run.nearest(folder, "raw")
    assert problems(tmp_path / "run") == ""
    outside = near.rename(tmp_path / "outside.png")
    near.symlink_to(outside)
    assert f"{NEAREST} was skipped: it lies outside the run directory" in written(tmp_path / "run")
    near.unlink()
    near.write_text(SECRET)
    page = written(tmp_path / "run")
    assert f"{NEAREST} was skipped: it is not a PNG file" in page
    assert SECRET not in page
    near.unlink()
    os.mkfifo(near)
    assert f"{NEAREST} was skipped: it is not a regular file" in written(tmp_path / "run")


@pytest.mark.parametrize("place", ["metrics.jsonl", "config.yaml", "scores/00003000-b/results.json"])
def test_a_named_pipe_is_not_waited_for(tmp_path: Path, place: str) -> None:
    fake_run.write_results(tmp_path, fake_run.results(), digest="a")
    (tmp_path / place).parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / place)
    assert f"{place} was skipped: it is not a regular file" in problems(tmp_path)


MALFORMED: dict[str, dict[str, Any]] = {
    "may_be_best.0: Input should be a valid string": {"may_be_best": [1]},
    "num_images: Input should be a valid integer": {"num_images": "many"},
    "rows: Input should be a valid array": {"rows": {"raw": 1}},
    "rows.0.significant: Input should be a valid boolean": {"rows": [{"weights": "x", "significant": "no"}]},
    "rows.0.weights: Input should be a valid string": {"rows": [{"weights": 3}]},
    "rows.0.stderr: Input should be greater than or equal to 0": {"rows": [{"weights": "raw", "stderr": -1.0}]},
    "rows.0.warnings: Input should be a valid array": {"rows": [{"weights": "raw", "warnings": "no"}]},
    "finished: Input should be a valid datetime": {"finished": "yesterday"},
    "step: Input should be a valid integer": {"step": 1e300},
    "evaluation: Input should be an object": {"evaluation": "ddim"},
    "Invalid JSON: unexpected end of hex escape": {"sampler": "\ud800"},
}


@pytest.mark.parametrize("says", MALFORMED)
def test_malformed_results_are_named_and_skipped(tmp_path: Path, says: str) -> None:
    folder = fake_run.write_results(tmp_path, fake_run.results(), digest="a").with_name("00003000-b")
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(fake_run.results() | MALFORMED[says]))
    assert f"scores/00003000-b/results.json was skipped: it is malformed: {says}" in problems(tmp_path)
    assert [scoring.folder for scoring in read(tmp_path).scorings] == ["00003000-a"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"schema": 3, "rows": [', "it is malformed: Invalid JSON: EOF"),
        ('{"schema": 7}', "it has schema 7, and this version reads 3"),
        ("[" * 100_000, "it is malformed: Invalid JSON: recursion limit exceeded"),
        ('{"schema": 3, "x": ' + "[" * 100_000, "it is malformed: Invalid JSON: recursion limit exceeded"),
        ("[2]", "it is malformed: Input should be an object"),
        ("\xff", "it is malformed: Invalid JSON"),
    ],
)
def test_results_that_are_no_results_are_named_and_skipped(tmp_path: Path, content: str, says: str) -> None:
    folder = fake_run.write_results(tmp_path, fake_run.results(2000), digest="a")
    other = fake_run.write_results(tmp_path, fake_run.results(3000), digest="a")
    (other / "results.json").write_text(content, encoding="latin1")
    (tmp_path / "metrics.jsonl").write_text('{"step": 3000, "loss": 1.0}\n')
    assert f"scores/00003000-a/results.json was skipped: {says}" in problems(tmp_path)
    assert "Step 2,000 was scored, and training has gone on to step 3,000" in written(tmp_path)
    assert folder.name == read(tmp_path).scorings[0].folder


@pytest.mark.parametrize(
    "line", ["[" * 100_000, '{"step": "x"}', "[]", '{"step": 1, "scores": 3}', '{"step": 1, "x": "\\ud800"}', "\0"]
)
def test_malformed_metrics_are_named_and_skipped_but_for_a_last_line_that_a_kill_cut_short(
    tmp_path: Path, line: str
) -> None:
    whole = '{"step": 10, "loss": 1.0}\n{"step": 20, "loss": 0.5}\n'
    (tmp_path / "metrics.jsonl").write_text(f"{line}\n{whole}")
    assert "metrics.jsonl: 1 malformed lines were skipped, such as line 1: " in problems(tmp_path)
    assert "Training loss" in written(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(whole + '{"step": 30, "los')
    assert problems(tmp_path) == ""


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("? [a, b]\n: c", "config.yaml was skipped: "),
        ("[" * 500, "config.yaml was skipped: maximum recursion depth exceeded"),
        ("seed: 2020-99-99", "config.yaml was skipped: month must be in 1..12"),
        ("seed: " + "9" * 6000, "config.yaml was skipped: Exceeds the limit"),
        ("averages: [1]", "config.yaml was skipped: it is malformed: averages: Input should be a valid dictionary"),
        ("data: {name: !!python/name:os.system }", "config.yaml was skipped: could not determine a constructor"),
    ],
)
def test_malformed_settings_are_named_and_skipped(tmp_path: Path, content: str, says: str) -> None:
    fake_run.write_results(tmp_path, fake_run.results())
    (tmp_path / "config.yaml").write_text(content)
    assert says in problems(tmp_path)


def test_settings_that_unfold_to_gigabytes_are_not_unfolded(tmp_path: Path) -> None:
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    (tmp_path / "config.yaml").write_text(
        f"{bomb}averages: {{e: {{kind: constant, decay: *i}}}}\nevaluation: {{sampler: *i}}\n"
    )
    assert "e (constant)</dd>" in written(tmp_path)


def test_a_manifest_of_another_shape_is_skipped_for_an_earlier_one(tmp_path: Path) -> None:
    for step, content in ((1000, fake_run.manifest(1000)), (2000, fake_run.manifest() | {"dataset": {"name": 3}})):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(json.dumps(content))
    assert (
        "step-00002000/manifest.json was skipped: it is malformed: dataset.name: Input should be a valid"
        in problems(tmp_path)
    )
    assert read(tmp_path).manifest.step == 1000


@pytest.mark.parametrize(
    "name", ["$\\frac$", "we$\\foo$ <b>", "a$b", "_{x}^2", "amp", "39", "\x1b]0;x\x07\n", "\x00", "漢字"]
)
def test_a_name_is_drawn_as_it_is(tmp_path: Path, name: str) -> None:
    """Two $ were once mathematics."""
    run = tmp_path / "a'b&amp;"
    rows = [fake_run.row("raw", 5.0), fake_run.row(name, 4.0, delta=(-1.0, 0.1))]
    fake_run.write_results(run, fake_run.results(rows=rows, reference="R&D's 'amp'"))
    page = written(run)
    assert "<b>" not in page
    assert "&<code>" not in page
    if name.isascii() and name.isprintable() and "<" not in name:
        assert page.count(name) >= 3  # headline, table, facts


def test_figures_of_any_size_are_drawn_or_left_out(tmp_path: Path) -> None:
    rows = [fake_run.row("raw", 1e29), fake_run.row("a", -1e29, 1e29, delta=(1e300, 1e29)), fake_run.row("b", 0.0, 0.0)]
    fake_run.write_results(tmp_path, fake_run.results(rows=rows))
    values = ("1e308", "-1e308", "NaN", "1e-320", "0", "-1", "true", "9" * 400)
    lines = [f'{{"step": {i}, "loss": {value}, "learning_rate": {value}}}' for i, value in enumerate(values)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert problems(tmp_path) == ""


def test_a_folder_whose_name_is_no_unicode_is_reported_on(tmp_path: Path) -> None:
    run = tmp_path / os.fsdecode(b"run\xff")
    fake_run.write_results(run, fake_run.results())
    assert "run?" in written(run)


def test_a_terminal_does_not_obey_what_a_file_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake_run.write_results(tmp_path, fake_run.results(sampler="\x1b]0;PWN\x07"))
    report.main([str(tmp_path)])
    assert "\x1b" not in capsys.readouterr().out


def test_a_link_under_the_temporary_name_is_not_followed(tmp_path: Path) -> None:
    victim, run = tmp_path / "bashrc", tmp_path / "run"
    victim.write_text("mine")
    fake_run.write_results(run, fake_run.results())
    (run / f".report.html.{os.getpid()}.partial").symlink_to(victim)
    written(run)
    assert victim.read_text() == "mine"
    assert not (run / "report.html").is_symlink()


def test_a_run_directory_that_cannot_be_written_gives_one_message_and_output_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read-only file system refuses even to unlink what is not there."""
    fake_run.write_results(tmp_path / "run", fake_run.results())

    def refused(path: Path, *_: Any, **__: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "write_bytes", refused)
    monkeypatch.setattr(Path, "unlink", refused)
    with pytest.raises(UserError, match=r"report.html: cannot be written \(Read-only file system\); choose another"):
        report.write(tmp_path / "run")
    monkeypatch.undo()
    assert report.write(tmp_path / "run", tmp_path / "page.html")[0].stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_run_on_a_read_only_mount_can_be_reported_on(tmp_path: Path) -> None:
    run, program = tmp_path / "run", "import sys; from ddpm_ema import cli, report; sys.exit(cli.guard(report.main))"
    fake_run.write_results(run, fake_run.results())
    script = f"""mount --bind {run} {run} && mount -o remount,ro,bind {run} || exit 77
{sys.executable} -c '{program}' {run}; echo rc $?
{sys.executable} -c '{program}' {run} --output {tmp_path}/page.html; echo rc $?"""
    done = subprocess.run(["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("mounting is not allowed here")
    assert "rc 2" in done.stdout
    assert "Read-only file system" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.endswith("page.html\nrc 0\n")


def test_a_reader_who_is_gone_is_no_error(tmp_path: Path) -> None:
    fake_run.write_results(tmp_path, fake_run.results())
    reading, writing = os.pipe()
    os.close(reading)
    program = "import sys; from ddpm_ema import cli, report; sys.exit(cli.guard(report.main))"
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], stdout=writing, stderr=subprocess.PIPE, text=True
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "report.html").is_file()


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was really trained, for twelve steps, and scored with a sweep."""
    run = live_runs.settings(
        tmp_path_factory.mktemp("real") / "digits",
        averages={name: fake_run.AVERAGES[name] for name in ("ema_0_999", "power_0_05", "power_0_10")},
        evaluation={**scored.EVALUATION, "sweep": {"stds": "0.06:0.2:3", "num_images": 30}},
        checkpoints={"every": 4, "keep": 3, "snapshots_every": 4},
        data__cache_dir=str(tmp_path_factory.mktemp("cache")),
        training__sample_every=6,
    )
    live_runs.finish(run)
    classifier = Trained(scored.classifier(), 0.1)
    save_classifier(run.output_dir / "features.safetensors", classifier, fingerprint="none", seed=0)
    score.run(run)
    return run.output_dir


def test_the_report_of_a_real_run_has_no_problem_and_gives_its_answer(real: Path) -> None:
    path, answer = report.write(real)
    assert read(real).problems == []
    assert answer.startswith("With ddim in 4 steps and 60 images per average: ship ")
    page = path.read_text()
    assert "the same noise for all, against these training images (train of digits, 1797 images)." in page
    assert page.count('<div class="switch"') == 3
    assert "Averages reconstructed after training." in page
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((real / "config.yaml").stat().st_mode)


def keys(entries: list[dict[str, Any]]) -> set[str]:
    return set().union(*(set(entry) for entry in entries))


def test_the_fake_run_has_the_keys_of_a_real_one(real: Path) -> None:
    """Else the tests on the fake would hold something that nothing writes."""
    found = json.loads(next(real.glob("scores/*/results.json")).read_text())
    fake = fake_run.results(**fake_run.swept())
    assert set(found) == set(fake)
    assert keys(found["rows"]) == keys(fake["rows"])
    assert keys(found["sweep"]) == keys(fake["sweep"])


def test_the_fake_runs_other_files_have_the_keys_of_a_real_ones(real: Path) -> None:
    manifest = json.loads(sorted(real.glob("checkpoints/*/manifest.json"))[-1].read_text())
    assert set(manifest) == set(fake_run.manifest())
    logged = json.loads((real / "metrics.jsonl").read_text().splitlines()[-1])
    fake = json.loads(fake_run.metrics().splitlines()[0])
    assert {key for key in logged if "/" not in key} == {key for key in fake if "/" not in key}
    assert set(yaml.safe_load((real / "config.yaml").read_text())) == set(fake_run.settings())
