"""What a stage tells a person goes to the logger `ddpm_ema`, which a caller can configure or silence like any other; and its bar."""

import logging
import os
import sys
import warnings
from typing import Any

logger = logging.getLogger("ddpm_ema")
LINE_SECONDS = 30.0
"""Between the lines that stand for a bar where there is no terminal."""


class _Stderr(logging.Handler):
    """One line on stderr; a warning says that it is one."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        write_line(prefix + record.getMessage())


def write_line(text: str) -> None:
    """One line on stderr, clear of progress bars. A log that nobody can read any more (`| tee` was stopped) ends no run."""
    bars = sys.modules.get("tqdm")  # without it there are none: not every install has it
    try:
        (bars.tqdm.write if bars else print)(text, file=sys.stderr)
    except OSError:  # also what is left in its buffer goes nowhere then, instead of failing at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def to_stderr(quiet: bool = False) -> None:
    """Shows messages on stderr: what a command does first, and a library never.

    `quiet` leaves warnings alone. Of the ranks of a launch only the first speaks: the others would repeat it.
    """
    if not any(isinstance(handler, _Stderr) for handler in logger.handlers):
        logger.addHandler(_Stderr())
        logger.propagate = False
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    if os.environ.get("RANK", "0") != "0":
        logger.setLevel(logging.ERROR)
        warnings.simplefilter("ignore")


def on_terminal() -> bool:
    """Whether a person watches, so that a bar may be drawn."""
    return sys.stderr.isatty()


class _LineFile:
    """Takes what tqdm draws, as lines of the log."""

    def write(self, text: str) -> None:
        if line := text.strip():
            logger.info(line)


def bar(title: str, total: int, unit: str, hidden: bool = False, initial: int = 0) -> Any:
    """tqdm's bar on a terminal; elsewhere a line every LINE_SECONDS; nothing if `hidden` or INFO is not logged.

    It counts `initial` ... `total` of a `unit` in the plural, such as `images`.
    """
    from tqdm import tqdm

    form = f"{{l_bar}}{{bar}}| {{n:.0f}}/{{total}} {unit} [{{elapsed}}<{{remaining}}, {{rate_fmt}}{{postfix}}]"
    look: dict[str, Any] = {"leave": False, "delay": 0.5, "dynamic_ncols": True, "bar_format": form}
    if not on_terminal():
        look = {"file": _LineFile(), "mininterval": LINE_SECONDS, "maxinterval": LINE_SECONDS, "delay": LINE_SECONDS}
        look["bar_format"] = f"{{desc}}: {{n:.0f}} of {{total}} {unit}, {{rate_fmt}}, {{remaining}} left"
    hidden = hidden or not logger.isEnabledFor(logging.INFO)
    return tqdm(total=total, initial=initial, desc=title, disable=hidden, unit="", **look)


def clock(seconds: float) -> str:
    """`1:02:03`, or `2:03` below an hour."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"
