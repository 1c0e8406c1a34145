"""`write`: a run directory → one HTML file that says which weights to ship, how sure that is, and how the run went."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ddpm_ema import options
from ddpm_ema.errors import UserError
from ddpm_ema.report import compare
from ddpm_ema.report.answer import answer, named, newest, rivals
from ddpm_ema.report.page import render, render_runs
from ddpm_ema.report.reading import read
from ddpm_ema.rundir import atomic_write


def write(
    runs: Path | str | Sequence[Path | str], output: Path | str | None = None, scoring: str | None = None
) -> tuple[Path, str]:
    """Reads run directories and writes one HTML file that needs no other; the file appears whole or not at all.

    The page of one run shows all data that it finds, and for what is missing the command that makes it. The page of several runs
    sets them side by side.

    Args:
        runs: One run directory or several.
        output: The file to write; none means RUN/report.html, or comparison.html in the folder that holds all of several runs.
        scoring: Folder name or digest of the scoring that answers; none means the newest that compares raw with an average.

    Returns:
        The file, and the answer in one sentence.

    Raises:
        UserError: `run` is no run directory, holds no such scoring, or the file cannot be written.
    """
    records = [read(Path(run)) for run in ([runs] if isinstance(runs, (str, Path)) else runs)]
    if len(records) > 1 and scoring is not None:
        raise UserError("--scoring: chooses the scoring of one run; give one run directory")
    if len(records) > 1:
        compared = compare.chosen(records)
        target = Path(os.path.commonpath([record.path.absolute().parent for record in records])) / "comparison.html"
        content, found = render_runs(compared)
    else:
        (record,) = records
        target = record.path / "report.html"
        chosen = newest(record.scorings) if scoring is None else named(record.scorings, scoring)
        content, found = render(record, chosen), "Nothing has been scored yet; the page says what to run."
        if chosen is not None:
            found = answer(chosen, rivals(chosen, record.scorings)).sentence
    target = Path(output or target)
    try:
        atomic_write(target, content.encode(errors="replace"))  # a path may hold what is no Unicode
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror}); choose another place with --output") from None
    return target, found


def main(argv: Sequence[str] | None = None) -> Path:
    """The command `ddpm-ema report`: writes the page, prints the answer and the path of the page."""
    arguments = options.report().parse_args(argv)
    path, found = write(arguments.runs, arguments.output, arguments.scoring)
    shown = f"{found}\nwrote {path}"  # a terminal must not obey what a file holds
    print("".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in shown))
    return path
