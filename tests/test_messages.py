"""What a person sees of a stage: a bar on a terminal, plain lines elsewhere, nothing where nobody asked."""

import os
import pty
import re
import subprocess
import sys
import termios

import pytest

from ddpm_ema import cli, messages
from ddpm_ema.errors import DivergedError, StoppedError, UserError

PROGRAM = """
import sys, time
from ddpm_ema import messages
if "library" not in sys.argv:
    messages.to_stderr(quiet="quiet" in sys.argv)
messages.LINE_SECONDS = 0.05
with messages.bar("raw", 4, "images", initial=0) as bar:
    for _ in range(4):
        time.sleep(0.3)
        bar.update(1)
messages.logger.info("done")
messages.logger.warning("careful")
"""


def test_elsewhere_than_on_a_terminal_progress_is_plain_lines_without_carriage_returns() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    *lines, after, warning = done.stderr.splitlines()
    assert "\r" not in done.stderr
    assert all(re.fullmatch(r"raw: [1-4] of 4 images, [ \d.]+/s, \d\d:\d\d left", line) for line in lines)
    assert lines[-1].startswith("raw: 4 of 4 images")
    assert (after, warning) == ("done", "warning: careful")


def on_a_terminal(*arguments: str) -> bytes:
    """What a person sees of PROGRAM."""
    reading, writing = pty.openpty()
    termios.tcsetwinsize(writing, (24, 120))
    subprocess.run([sys.executable, "-c", PROGRAM, *arguments], stdout=subprocess.DEVNULL, stderr=writing, check=True)
    os.close(writing)
    shown = b""
    while True:
        try:
            shown += os.read(reading, 65536)
        except OSError:  # the end, as a terminal tells it
            return shown


def test_on_a_terminal_progress_is_one_bar_with_the_time_left_that_goes_when_it_ends() -> None:
    shown = on_a_terminal()
    assert re.search(rb"[1-4]/4 images \[\d\d:\d\d<\d\d:\d\d,", shown)
    assert b" of 4 images" not in shown


STOPPED = """
import os, signal, sys
from ddpm_ema import cli, distributed, errors, messages
def run():
    with distributed.StopFlag() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        messages.logger.info("step 5")
        raise errors.StoppedError(stop.reason)
sys.exit(cli.guard(run))
"""


def test_a_run_whose_log_has_no_reader_any_more_goes_on_and_keeps_its_exit_code() -> None:
    """As of `2>&1 | tee` at Ctrl-C, which ends tee first."""
    command = '"$0" -c "$1" 2>&1 | true; exit ${PIPESTATUS[0]}'
    assert subprocess.run(["bash", "-c", command, sys.executable, STOPPED]).returncode == 75


def test_a_library_shows_no_bar() -> None:
    assert on_a_terminal("library") == b"careful\r\n"


@pytest.mark.parametrize(("arguments", "rank"), [(["quiet"], "0"), ([], "1")])
def test_quiet_and_the_other_ranks_show_no_progress(arguments: list[str], rank: str) -> None:
    environment = {**os.environ, "RANK": rank}
    command = [sys.executable, "-c", PROGRAM, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stderr == ("warning: careful\n" if rank == "0" else "")


@pytest.mark.parametrize("error", [DivergedError("all said so"), StoppedError("all said so")])
def test_what_every_rank_raises_is_printed_by_one_of_each_machine(
    error: UserError, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    for rank, count in (("0", 1), ("1", 0)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert cli.guard(fail) == error.exit_code
        assert capsys.readouterr().err.count("all said so") == count


def test_an_error_of_its_own_is_printed_by_any_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise UserError("only here")

    monkeypatch.setenv("LOCAL_RANK", "1")
    cli.guard(fail)
    assert "only here" in capsys.readouterr().err


@pytest.mark.parametrize(("seconds", "text"), [(5, "0:05"), (125, "2:05"), (3723, "1:02:03")])
def test_a_duration_is_hours_minutes_and_seconds(seconds: float, text: str) -> None:
    assert messages.clock(seconds) == text
