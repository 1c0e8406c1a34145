"""The run directory: files that appear whole or not at all, checkpoints in order of their steps, results set aside."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ddpm_ema.averaging import Uniform, write_snapshot
from ddpm_ema.averaging.files import save_tensors
from ddpm_ema.errors import UserError
from ddpm_ema.rundir import RunDir, atomic_write, directory, new_folder


def files(value: float = 1.0, size: int = 4) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "raw.safetensors": {"w": torch.full((size,), value)},
        "averages/ema.safetensors": {"w": torch.full((size,), value / 2)},
    }


@pytest.fixture
def rundir(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    for step in (1, 2, 3):
        run.write_checkpoint(step, files(step), {"seed": 0})
    return run


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_checkpoint_gives_back_bit_for_bit_what_was_written(rundir: RunDir) -> None:
    tensors = {"a": torch.randn(3, 5).to(memory_format=torch.contiguous_format), "b": torch.randn(2, 3, 4, 4)}
    tensors["b"] = tensors["b"].to(memory_format=torch.channels_last)  # which safetensors itself refuses
    checkpoint = rundir.write_checkpoint(4, {"raw.safetensors": tensors}, {"seed": 7})
    back = checkpoint.weights("raw")
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    assert (checkpoint.manifest["step"], checkpoint.manifest["seed"], checkpoint.manifest["schema"]) == (4, 7, 1)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_can_be_read_by_whom_the_umask_allows(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        checkpoint = RunDir(tmp_path).write_checkpoint(1, files(), {})
        save_tensors(tmp_path / "features.safetensors", {"w": torch.ones(2)})
        write_snapshot(tmp_path / "step-00000001" / "ema.safetensors", {"w": torch.ones(2)}, 1, Uniform())
    finally:
        os.umask(before)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) == 3 + len(files())
    assert checkpoint.path / "manifest.json" in written
    assert {path.stat().st_mode & 0o777 for path in written} == {mode}


def test_the_order_of_checkpoints_comes_from_their_steps_and_not_from_clocks(rundir: RunDir) -> None:
    rundir.write_checkpoint(100_000_000, files(9), {})  # nine digits sort before eight as text
    for number, checkpoint in enumerate(rundir.checkpoints()):
        os.utime(checkpoint.path, (2e9 - number, 2e9 - number))  # a clock set back between saves
    newest, passed_over = rundir.newest_whole()
    assert newest is not None
    assert (newest.step, passed_over) == (100_000_000, [])


@pytest.mark.parametrize("kind", ["flipped bit", "truncated", "missing", "manifest cut short", "no manifest"])
def test_a_bad_checkpoint_is_named_and_the_one_before_it_is_used(rundir: RunDir, kind: str) -> None:
    folder = rundir.checkpoint(3).path
    path = folder / "averages" / "ema.safetensors"
    if kind == "flipped bit":
        data = bytearray(path.read_bytes())
        data[-3] ^= 0x10
        path.write_bytes(data)
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:-4])
    elif kind == "missing":
        path.unlink()
    else:
        path = folder / "manifest.json"
        path.write_text(path.read_text()[:-20]) if "cut" in kind else path.unlink()
    newest, passed_over = rundir.newest_whole()
    assert newest is not None
    assert newest.step == 2
    assert len(passed_over) == 1
    assert (str(path) if "manifest" not in kind else str(folder)) in passed_over[0]
    assert kind != "flipped bit" or "sha256 mismatch" in passed_over[0]


@pytest.mark.parametrize(
    "files",
    [
        ["raw.safetensors"],
        None,
        {"raw.safetensors": {"sha256": "0"}},
        {"raw.safetensors": 4},
        {"../../../secret.safetensors": {"sha256": "0", "bytes": 1}},
        {"averages/../x.safetensors": {"sha256": "0", "bytes": 1}},
    ],
)
def test_a_manifest_of_any_other_shape_is_one_message_and_leads_nowhere(rundir: RunDir, files: object) -> None:
    path = rundir.checkpoint(3).path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"files": files}))
    newest, passed_over = rundir.newest_whole()
    assert newest is not None
    assert newest.step == 2
    assert "does not describe step 3" in passed_over[0]


def test_a_file_that_cannot_be_read_is_named(rundir: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a colleague whose umask is 077."""

    def denied(path: Path) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr("ddpm_ema.rundir.checkpoint.file_sha256", denied)
    with pytest.raises(UserError, match=r"raw\.safetensors: cannot be read \(Permission denied\)"):
        rundir.checkpoint(3).weights("raw")


def test_tensors_of_a_checkpoint_with_a_flipped_bit_are_never_handed_out(rundir: RunDir) -> None:
    path = rundir.checkpoint(3).path / "raw.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="sha256 mismatch"):
        rundir.checkpoint(3).weights("raw")


def test_weights_that_a_checkpoint_does_not_hold_are_refused_with_the_names_it_holds(rundir: RunDir) -> None:
    with pytest.raises(UserError, match="raw, ema"):
        rundir.checkpoint(1).weights("swa")
    with pytest.raises(UserError, match="steps there: 1, 2, 3"):
        rundir.checkpoint(9)


def test_pruning_keeps_the_newest_and_every_mth_and_never_fewer_than_two(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for step in range(1, 11):
        run.write_checkpoint(step, files(), {})
        run.prune(keep=2, keep_every=4)
    assert [c.step for c in run.checkpoints()] == [4, 8, 9, 10]
    run.prune(keep=0, keep_every=None)
    assert [c.step for c in run.checkpoints()] == [9, 10]


def test_a_full_disk_leaves_old_checkpoints_whole_and_says_how_much_is_needed(small_disk: Path) -> None:
    run = RunDir(small_disk / "run")
    run.write_checkpoint(1, files(), {})
    with pytest.raises(UserError, match=r"disk is full: 8,000,000 bytes needed, [\d,]+ free"):
        run.write_checkpoint(2, files(size=1_000_000), {})
    assert sorted(p.name for p in (small_disk / "run" / "checkpoints").iterdir()) == ["step-00000001"]
    assert run.newest_whole()[0] is not None


def test_a_disk_that_fills_up_while_writing_is_reported_the_same_way(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "ddpm_ema.rundir.directory.require_space", lambda *_: None
    )  # as if another program took the space later
    run = RunDir(small_disk / "run")
    run.write_checkpoint(1, files(), {})
    with pytest.raises(UserError, match="disk is full: 8,000,000 bytes needed"):
        run.write_checkpoint(2, files(size=1_000_000), {})
    assert [p.name for p in (small_disk / "run" / "checkpoints").iterdir()] == ["step-00000001"]


def test_a_folder_that_is_exported_onto_a_full_disk_leaves_nothing_and_is_one_message(small_disk: Path) -> None:
    with (
        pytest.raises(UserError, match=r"out: cannot be written \(.*os error 28.*--output"),
        new_folder(small_disk / "out", "--output") as partial,
    ):
        save_file({"w": torch.zeros(1_000_000)}, partial / "w.safetensors")  # as diffusers writes
    assert list(small_disk.iterdir()) == []


def test_rows_are_on_disk_before_a_checkpoint_that_a_run_goes_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, synced = RunDir(tmp_path), []
    monkeypatch.setattr(
        directory, "sync", lambda path: synced.append((path, (path.parent / "checkpoints" / "step-00000001").exists()))
    )
    run.append_metrics({"step": 1})
    run.write_checkpoint(1, files(), {})
    assert synced == [(run.metrics_path, False)]


def test_temporaries_lie_beside_their_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moves: list[tuple[Path, Path]] = []
    replace = os.replace

    def record(source: Path, target: Path) -> None:
        moves.append((Path(source), Path(target)))
        replace(source, target)

    monkeypatch.setattr(os, "replace", record)
    run = RunDir(tmp_path / "run")
    run.write_checkpoint(1, files(), {})
    atomic_write(run.config_path, "x")
    save_tensors(run.path / "a" / "x.safetensors", {"w": torch.ones(1)})
    assert len(moves) >= 4
    assert all(source.parent == target.parent for source, target in moves)


def test_a_link_that_lies_where_the_temporary_belongs_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("thesis")
    (tmp_path / f".x.{os.getpid()}.partial").symlink_to(victim)
    atomic_write(tmp_path / "x", "new")
    assert victim.read_text() == "thesis"
    assert (tmp_path / "x").read_text() == "new"


KILLED_WHILE_SAVING = """
import sys, torch
from ddpm_ema.rundir import RunDir
run = RunDir(sys.argv[1])
for step in range(1, 1000):
    big = {f"w{i}": torch.full((50_000,), float(step)) for i in range(20)}
    run.write_checkpoint(step, {"raw.safetensors": big, "averages/ema.safetensors": big}, {})
    run.prune(2, None)
    print(step, flush=True)
"""


def test_a_kill_at_any_moment_of_saving_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        child = subprocess.Popen([sys.executable, "-c", KILLED_WHILE_SAVING, folder], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        for _ in range(2):
            said = int(child.stdout.readline())
        time.sleep(0.026 * attempt)
        child.send_signal(signal.SIGKILL)
        child.wait()
        said = max([said, *(int(line) for line in child.stdout.read().split())])
        run = RunDir(folder)
        newest, passed_over = run.newest_whole()
        assert newest is not None
        assert passed_over == []
        assert newest.step >= said, "a save that returned is on disk"
        assert newest.weights("ema")["w7"].unique().tolist() == [float(newest.step)]
        with run.lock():
            assert not list(folder.rglob("*.partial")), "the next run clears what the kill left"


def test_what_killed_writes_left_is_deleted_by_the_next_run_and_by_the_next_write_of_the_same_file(
    tmp_path: Path,
) -> None:
    run, gone = RunDir(tmp_path / "run"), 4194304  # above the highest process id
    left = [
        "checkpoints/.step-00000003.7.partial/raw.safetensors",
        "checkpoints/.step-00000001.7.deleted/raw.safetensors",
        "snapshots/step-00000003/.ema.safetensors.7.partial",
        "snapshots/step-00000003/.tmpaB3dE6",  # safetensors' own
        "samples/.step-00000003.png.7.partial",
        "weights/0f/.features-0.safetensors.7.partial",
    ]
    kept = ["snapshots/step-00000003/ema.safetensors", f".report.html.{os.getppid()}.partial", "scores/.own"]
    for name in (*left, *kept):
        (run.path / name).parent.mkdir(parents=True, exist_ok=True)
        (run.path / name).write_text("")
    with run.lock():
        assert sorted(p.name for p in run.path.rglob("*") if p.is_file()) == sorted(
            [*(Path(n).name for n in kept), ".lock"]
        )
    for name in (f".report.html.{gone}.partial", f".report.html.{os.getpid()}.partial", f".other.{gone}.partial"):
        (run.path / name).write_text("")
    atomic_write(run.path / "report.html", "page")
    assert {p.name for p in run.path.glob(".*.partial")} == {f".other.{gone}.partial", Path(kept[1]).name}


def test_rows_after_the_resumed_step_and_a_row_cut_short_are_dropped(rundir: RunDir) -> None:
    for step in (1, 2, 3, 4):
        rundir.append_metrics({"step": step, "loss": 0.1})
    with open(rundir.metrics_path, "a") as file:
        file.write('{"step": 2, "lo')
    for step in (2, 3):
        atomic_write(rundir.snapshot_path(step, "power"), b"")
    rundir.drop_after(2)
    assert [json.loads(line)["step"] for line in rundir.metrics_path.read_text().splitlines()] == [1, 2]
    assert [path.parent.name for path in rundir.snapshots()["power"]] == ["step-00000002"]
    assert [c.step for c in rundir.checkpoints()] == [1, 2]


def test_scores_sample_grids_and_reconstructions_of_steps_that_are_trained_anew_are_set_aside(rundir: RunDir) -> None:
    later = (
        "scores/00000003-ab/results.json",
        "samples/step-00000003.png",
        "reconstructed/step-00000003/power.safetensors",
    )
    kept = (
        "scores/00000002-ab/results.json",
        "samples/step-00000002.png",
        "reconstructed/step-00000002/power.safetensors",
    )
    (rundir.path / "samples").symlink_to(tempfile.mkdtemp(dir="/dev/shm"))  # another file system
    for name in (*later, *kept):
        atomic_write(rundir.path / name, name)
    aside = rundir.drop_after(2)
    assert aside == rundir.path / "previous-1"
    for name in later:
        assert (aside / name).read_text() == name
        assert not (rundir.path / name).exists()
    assert all((rundir.path / name).exists() for name in kept)
    assert [path.name for path in (rundir.path / "scores").iterdir()] == ["00000002-ab"]
    assert rundir.drop_after(2) is None
    assert rundir.move_aside() == rundir.path / "previous-2"
    assert not (rundir.path / "reconstructed").exists()
    shutil.rmtree((rundir.path / "previous-2" / "samples").resolve())


def test_a_checkpoint_that_training_deletes_while_it_is_read_says_so_and_which_setting_keeps_it(rundir: RunDir) -> None:
    opened, unopened = rundir.checkpoint(1), rundir.checkpoint(1)
    assert opened.manifest["step"] == 1
    shutil.rmtree(opened.path)
    for checkpoint in (opened, unopened):
        with pytest.raises(UserError, match=r"step-00000001: is no longer there\. .*checkpoints\.keep"):
            checkpoint.weights("ema")


def test_moving_aside_keeps_everything_of_the_earlier_run(rundir: RunDir) -> None:
    rundir.append_metrics({"step": 1})
    (rundir.path / "features.safetensors").write_bytes(b"x")
    (rundir.path / "previous-7.old").mkdir()  # a person's own name, which is no number
    aside = rundir.move_aside()
    assert aside == rundir.path / "previous-1"
    assert RunDir(aside).newest_whole()[0] is not None
    assert rundir.checkpoints() == []
    assert (rundir.path / "features.safetensors").exists(), "the feature classifier is not the run's, and stays"
    assert rundir.move_aside() is None


def test_a_folder_named_like_a_checkpoint_that_is_a_file_or_odd_is_ignored(rundir: RunDir) -> None:
    (rundir.path / "checkpoints" / "step-0000000x").mkdir()
    (rundir.path / "checkpoints" / "step-00000009").write_text("a file")
    shutil.copytree(rundir.checkpoint(3).path, rundir.path / "checkpoints" / "backup-of-step-00000003")
    assert [c.step for c in rundir.checkpoints()] == [1, 2, 3]


def test_a_checkpoint_under_another_step_s_name_is_not_trusted(rundir: RunDir) -> None:
    shutil.copytree(rundir.checkpoint(3).path, rundir.path / "checkpoints" / "step-00000007")
    newest, passed_over = rundir.newest_whole()
    assert newest is not None
    assert newest.step == 3
    assert "does not describe step 7" in passed_over[0]


def test_names_and_writes_of_files_load_no_torch() -> None:
    code = "import sys, ddpm_ema.rundir; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
