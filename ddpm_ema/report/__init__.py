"""A run directory → report.html: which weights to ship, how sure that is, and how the run went. No torch is loaded."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ddpm_ema import options
from ddpm_ema.errors import UserError
from ddpm_ema.report import choice
from ddpm_ema.report.page import render
from ddpm_ema.report.reading import read

__all__ = ["main", "write"]

NOTHING = "Nothing has been scored yet; the page says what to run."


def write(run: Path | str, output: Path | str | None = None, scoring: str | None = None) -> tuple[Path, str]:
    """Reads the run directory `run` and writes one HTML file that needs no other.

    Whatever is there is shown; what is missing is replaced by the command that makes it. The file appears whole or not at all.

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
    chosen = choice.newest(record.scorings) if scoring is None else choice.named(record.scorings, scoring)
    target = Path(output) if output is not None else record.path / "report.html"
    _write(target, render(record, chosen).encode(errors="replace"))  # a path may hold what is no Unicode
    return target, choice.answer(chosen, choice.rivals(chosen, record.scorings)).sentence if chosen else NOTHING


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
    """The command `ddpm-ema report`: writes the page, prints the answer and where the page is."""
    arguments = options.report().parse_args(argv)
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
