"""What a stage tells a person goes to the logger `ddpm_ema`, which a caller can configure or silence like any other; and its bar."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from typing import Any

logger = logging.getLogger("ddpm_ema")
LINE_SECONDS = 30.0
"""Between the lines that stand for a bar where there is no terminal."""


class _Stderr(logging.Handler):
    """One line on stderr, clear of progress bars; a warning says that it is one."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        tqdm.write(prefix + record.getMessage(), file=sys.stderr)


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


class _Lines:
    """Stands for a bar: a line every LINE_SECONDS, and one at the end of what took as long."""

    def __init__(self, title: str, total: int, unit: str) -> None:
        self.title, self.total, self.unit, self.n = title, total, unit, 0.0
        self._start = self._said = time.monotonic()

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._said > self._start:
            took = clock(time.monotonic() - self._start)
            logger.info(f"{self.title}: {self.n:,.0f} of {self.total:,} {self.unit} in {took}")

    def update(self, count: float = 1) -> None:
        self.n += count
        if (now := time.monotonic()) - self._said >= LINE_SECONDS:
            self._said = now
            rate = self.n / (now - self._start)
            left = (self.total - self.n) / rate if rate else 0
            logger.info(f"{self.title}: {self.n:,.0f} of {self.total:,} {self.unit}, {rate:.3g}/s, {clock(left)} left")


def bar(title: str, total: int, unit: str, hidden: bool = False, initial: int = 0) -> Any:
    """A bar with the time left on a terminal; elsewhere plain lines; nothing if `hidden` or INFO is not logged.

    Args:
        title: what is done.
        total: how many `unit` it takes.
        unit: plural, such as `images`.
        hidden: for ranks that have nothing to say.
        initial: how many were done before.

    Returns:
        a context manager with `n`, `total` and `update(count)`; tqdm's on a terminal.
    """
    shown = logger.isEnabledFor(logging.INFO) and not hidden
    if shown and not on_terminal():
        return _Lines(title, total, unit)
    from tqdm import tqdm

    form = f"{{l_bar}}{{bar}}| {{n:.0f}}/{{total}} {unit} [{{elapsed}}<{{remaining}}, {{rate_fmt}}{{postfix}}]"
    look: dict[str, Any] = {"leave": False, "delay": 0.5, "dynamic_ncols": True, "bar_format": form, "unit": ""}
    return tqdm(total=total, initial=initial, desc=title, disable=not shown, **look)


def clock(seconds: float) -> str:
    """`1:02:03`, or `2:03` below an hour."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"
