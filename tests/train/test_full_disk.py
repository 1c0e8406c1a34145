"""A disk that fills up while a run logs, previews or stores is one message, and the run goes on when there is room."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from live_runs import assert_bit_equal, exact, rows, settings, state

from ddpm_ema import config, train
from ddpm_ema.errors import UserError

EVERYTHING = {"checkpoints__every": 6, "checkpoints__snapshots_every": 4, "training__sample_every": 5}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> config.Config:
    run = settings(tmp_path_factory.mktemp("whole") / "run", **EVERYTHING)
    train.run(run)
    return run


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own."""
    (tmp_path / "disk").mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "tmpfs", tmp_path / "disk"]).returncode:
        pytest.skip("mounting a small file system needs root")
    yield tmp_path / "disk"
    subprocess.run(["umount", "-l", tmp_path / "disk"], check=True)


# Room in KiB for: the lock alone; config.yaml and a snapshot of the initial weights, and not for rows; some rows, and no grid.
@pytest.mark.parametrize("room", [4, 212, 240, 420, 1000])
def test_it_is_one_message_and_the_run_ends_as_an_undisturbed_one_when_there_is_room(
    undisturbed: config.Config, disk: Path, room: int
) -> None:
    run = settings(disk / "run", **EVERYTHING)
    subprocess.run(["mount", "-o", f"remount,size={room}k", disk], check=True)
    with pytest.raises(UserError, match=r"No space left on device\); make room|the disk is full: [\d,]+ bytes needed"):
        train.run(run)
    subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
    train.run(run)
    assert_bit_equal(state(run), state(undisturbed))
    assert exact(run) == exact(undisturbed)
    assert [row["step"] for row in rows(run)] == list(range(1, 13))
    made = {path.relative_to(run.output_dir) for path in run.output_dir.rglob("*")}
    expected = {path.relative_to(undisturbed.output_dir) for path in undisturbed.output_dir.rglob("*")}
    assert {path for path in made if path.parts[0] != "previous-1"} == expected, "a grid of a lost step is set aside"
