"""`write`: a run directory → one HTML file that says which weights to ship, how sure that is, and how the run went."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ddpm_ema import options
from ddpm_ema.errors import UserError
from ddpm_ema.report.answer import answer, named, newest, rivals
from ddpm_ema.report.page import render
from ddpm_ema.report.reading import read
from ddpm_ema.rundir import atomic_write


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
    try:
        atomic_write(target, render(record, chosen).encode(errors="replace"))  # a path may hold what is no Unicode
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror}); choose another place with --output") from None
    if chosen is None:
        return target, "Nothing has been scored yet; the page says what to run."
    return target, answer(chosen, rivals(chosen, record.scorings)).sentence


def main(argv: Sequence[str] | None = None) -> Path:
    """The command `ddpm-ema report`: writes the page, prints the answer and the path of the page."""
    arguments = options.report().parse_args(argv)
    path, found = write(arguments.run, arguments.output, arguments.scoring)
    shown = f"{found}\nwrote {path}"  # a terminal must not obey what a file holds
    print("".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in shown))
    return path
