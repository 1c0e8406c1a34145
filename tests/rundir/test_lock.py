"""One run per folder: by the kernel's lock on one host, by a heartbeat between hosts."""

import errno
import json
import os
import socket
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest

from ddpm_ema.errors import UserError
from ddpm_ema.rundir import RunDir
from ddpm_ema.rundir.lock import Lock

HOLD = """
import sys, time
from ddpm_ema.rundir import RunDir
with RunDir(sys.argv[1]).lock():
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_in_one_folder_is_refused_with_host_and_process_of_the_first(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    with (
        pytest.raises(UserError, match=rf"process {child.pid} on host {socket.gethostname()}"),
        RunDir(tmp_path).lock(),
    ):
        pass
    child.kill()
    child.wait()
    with RunDir(tmp_path).lock():  # its process is gone: taken over at once
        pass


def test_a_lock_of_another_host_is_held_while_its_heartbeat_goes_on_and_taken_over_when_it_stops(
    tmp_path: Path,
) -> None:
    path = tmp_path / ".lock"
    path.write_text(json.dumps({"host": "node-7", "pid": 4242}))
    done = threading.Event()

    def beat() -> None:
        while not done.wait(0.02):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UserError, match="process 4242 on host node-7"):
            Lock(path, heartbeat=0.1).__enter__()
    finally:
        done.set()
        thread.join()
    lock = Lock(path, heartbeat=0.1)
    lock.__enter__()
    lock.__exit__()
    assert path.read_text() == "", "a lock that was released makes nobody wait"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_on_a_file_system_without_record_locks_the_heartbeat_keeps_the_second_run_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.lockf", refuse)
    path = tmp_path / ".lock"
    path.write_text(json.dumps({"host": socket.gethostname(), "pid": 4242}))  # killed: its heartbeat is gone
    with Lock(path, heartbeat=0.05):
        with pytest.raises(UserError, match=f"process {os.getpid()} on host {socket.gethostname()}"):
            Lock(path, heartbeat=0.05).__enter__()
        assert json.loads(path.read_text())["pid"] == os.getpid()

    def other_writes(_: float) -> None:
        path.write_text(json.dumps({"host": "node-7", "pid": 7}))

    monkeypatch.setattr("time.sleep", other_writes)
    with pytest.raises(UserError, match="process 7 on host node-7"):  # of two that start at once, one goes on
        Lock(path, heartbeat=0.05).__enter__()


def test_links_that_a_stranger_laid_where_lock_and_log_belong_are_not_followed(tmp_path: Path) -> None:
    victim, run = tmp_path / "thesis.tex", RunDir(tmp_path / "run")
    victim.write_text("chapter 1")
    run.path.mkdir()
    for path, write in (
        (run.path / ".lock", run.lock().__enter__),
        (run.metrics_path, partial(run.append_metrics, {})),
    ):
        path.symlink_to(victim)
        with pytest.raises((UserError, OSError), match="Too many levels of symbolic links"):
            write()
    assert victim.read_text() == "chapter 1"


def test_a_read_only_folder_is_refused_before_anything_else(tmp_path: Path) -> None:
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", tmp_path]).returncode:
        pytest.skip("mounting a read-only file system needs root")
    try:
        with pytest.raises(UserError, match="cannot be written"), RunDir(tmp_path / "run").lock():
            pass
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)
