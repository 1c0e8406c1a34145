"""`write`: a run directory → one HTML file that says which weights to ship, how sure that is, and how the run went."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ddpm_ema.errors import UserError
from ddpm_ema.report.answer import answer, named, newest, rivals
from ddpm_ema.report.page import render
from ddpm_ema.report.reading import read


def write(run: Path | str, output: Path | str | None = None, scoring: str | None = None) -> tuple[Path, str]:
    """Reads the run directory `run` and writes one HTML file that needs no other; the file appears whole or not at all.

    The page shows all data that it finds, and for what is missing the command that makes it.

    Args:
        run: The run directory.
        output: The file to write; none means RUN/report.html.
        scoring: Folder name or digest of the scoring that answers; none means the newest that compares raw with an average.

    Returns:
        The file, and the answer in one sentence.

    Raises:
        UserError: `run` is no run directory, holds no such scoring, or the file cannot be written.
    """
    record = read(Path(run))
    chosen = newest(record.scorings) if scoring is None else named(record.scorings, scoring)
    target = Path(output) if output is not None else record.path / "report.html"
    _write(target, render(record, chosen).encode(errors="replace"))  # a path may hold what is no Unicode
    if chosen is None:
        return target, "Nothing has been scored yet; the page says what to run."
    return target, answer(chosen, rivals(chosen, record.scorings)).sentence


def _write(target: Path, page: bytes) -> None:
    """rundir.atomic_write does the same, but loads torch."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        temporary.unlink(missing_ok=True)  # and "x": a link that a stranger left there is not followed
        with open(temporary, "xb") as file:
            file.write(page)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        with contextlib.suppress(OSError):  # a read-only folder refuses this, too
            temporary.unlink(missing_ok=True)
        raise UserError(f"{target}: cannot be written ({error.strerror}); choose another place with --output") from None


def main(argv: Sequence[str] | None = None) -> Path:
    """The command line: writes the page, prints the answer and the path of the page."""
    parser = argparse.ArgumentParser(prog="report.py", description="Writes report.html for a run directory.")
    parser.add_argument("run", type=Path, help="the run directory, such as runs/digits")
    parser.add_argument("--output", type=Path, default=None, help="the file to write (default: RUN/report.html)")
    parser.add_argument(
        "--scoring",
        help="folder name or digest of the scoring that answers (default: the newest that compares raw with an average)",
    )
    arguments = parser.parse_args(argv)
    path, answer = write(arguments.run, arguments.output, arguments.scoring)
    _print(f"{answer}\nwrote {path}")
    return path


def _print(text: str) -> None:
    """For a terminal, which must not obey what a file holds; a reader who is gone (`| head`) is no error."""
    shown = "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
    try:
        print(shown, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to fail at exit
