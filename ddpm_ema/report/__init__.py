"""A run directory → report.html: which weights to ship, how sure that is, and how the run went. No torch is loaded."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from ddpm_ema.errors import UserError
from ddpm_ema.report.page import render
from ddpm_ema.report.record import read
from ddpm_ema.report.verdict import judge

__all__ = ["main", "write"]


def write(run: Path | str, output: Path | str | None = None) -> Path:
    """Reads the run directory `run` and writes one HTML file that needs no other; returns its path.

    Whatever is there is shown; what is missing is replaced by the command that makes it. The file appears whole or not at
    all. Raises UserError if `run` is no run directory or the file cannot be written.
    """
    record = read(Path(run))
    target = Path(output) if output is not None else record.path / "report.html"
    page = render(record).encode()
    # rundir.atomic_write does the same, but loads torch.
    temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with open(temporary, "wb") as file:
            file.write(page)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror}); choose another place with --output") from None
    finally:
        temporary.unlink(missing_ok=True)
    return target


def main(argv: Sequence[str] | None = None) -> Path:
    """The command line of scripts/report.py: writes the page, prints the answer and where the page is."""
    parser = argparse.ArgumentParser(prog="report.py", description="Writes report.html for a run directory.")
    parser.add_argument("run", type=Path, help="the run directory, such as runs/digits")
    parser.add_argument("--output", type=Path, default=None, help="the file to write (default: RUN/report.html)")
    arguments = parser.parse_args(argv)
    path = write(arguments.run, arguments.output)
    scoring = read(arguments.run).main
    print(judge(scoring).sentence if scoring else "Nothing has been scored yet; the page says what to run.")
    print(f"wrote {path}")
    return path
