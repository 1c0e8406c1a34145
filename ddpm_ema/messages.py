"""What a stage tells a person goes to the logger `ddpm_ema`, which a caller can configure or silence like any other."""

from __future__ import annotations

import logging
import sys

logger = logging.getLogger("ddpm_ema")


class _Stderr(logging.Handler):
    """One line on stderr, clear of progress bars; a warning says that it is one."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        tqdm.write(prefix + record.getMessage(), file=sys.stderr)


def to_stderr() -> None:
    """Shows messages on stderr: what a command does first, and a library never."""
    if not any(isinstance(handler, _Stderr) for handler in logger.handlers):
        logger.addHandler(_Stderr())
        logger.setLevel(logging.INFO)
        logger.propagate = False
