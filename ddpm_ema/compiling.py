"""torch.compile on machines that stop programs: truncated libraries in its cache, stops while it compiles, one message if it fails.

A kill while the linker writes leaves a truncated library in torch's cache, and every later start crashes when it loads it. So
truncated libraries are deleted before anything is compiled.
"""

from __future__ import annotations

import contextlib
import logging
import struct
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from ddpm_ema.distributed import StopFlag
from ddpm_ema.errors import StoppedError, UserError
from ddpm_ema.messages import logger

LINKING_SECONDS = 10.0
"""A library modified this recently may still be written by another program's linker."""


def prepare(setting: str, tell: Callable[[str], object] = logger.info) -> None:
    """Deletes truncated libraries from torch's cache and says that compiling takes long; call it before the first compiled call.

    Args:
        setting: key path of the setting that switches compiling on.
        tell: takes a line for the user; only the first rank passes one that prints.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    for path in Path(cache_dir()).rglob("*.so"):
        if _is_cut_off(path):
            path.unlink(missing_ok=True)
            tell(f"{path}: was cut off by a kill while torch.compile wrote it; deleted, to be compiled again")
    # Two remarks of torch that ask nothing of a user would stand among the first lines of every log.
    warnings.filterwarnings("ignore", message=r"Dynamo detected a call to a `functools\.lru_cache`-wrapped")
    quiet = "No CUDA runtime is found"
    logging.getLogger("torch.utils.cpp_extension").addFilter(lambda record: not record.getMessage().startswith(quiet))
    tell(f"compiling the network ({setting}): the first step may take minutes, on busy cores many")


def _is_cut_off(path: Path) -> bool:
    try:
        if _is_whole(path):
            return False
        time.sleep(max(0.0, LINKING_SECONDS - (time.time() - path.stat().st_mtime)))
        return not _is_whole(path)
    except OSError:
        return False  # gone, or another user's


def _is_whole(path: Path) -> bool:
    """Whether the file contains its whole section table, which linkers write last (64-bit ELF)."""
    with open(path, "rb") as file:
        header = file.read(64)
    if len(header) < 64 or header[:5] != b"\x7fELF\x02":
        return False
    (offset,), (entry, number) = struct.unpack_from("<Q", header, 0x28), struct.unpack_from("<HH", header, 0x3A)
    return offset > 0 and offset + entry * number <= path.stat().st_size


@contextlib.contextmanager
def explained(setting: str, stop: StopFlag | None = None) -> Iterator[None]:
    """Turns torch's errors in calls that may compile into one message.

    Args:
        setting: key path of the setting that switches compiling on.
        stop: says whether a stop was requested; a signal to the whole process group kills the compiler first.

    Raises:
        StoppedError: a stop was requested while it compiled.
        UserError: the network cannot be compiled here.
    """
    try:
        yield
    except Exception as error:
        # By name, because importing the class takes seconds.
        if all(base.__name__ != "TorchDynamoException" for base in type(error).__mro__):
            raise
        if stop is not None and stop.requested:
            raise StoppedError(f"stopped by {stop.reason} while torch.compile worked; start again") from None
        why = next((line for line in str(error).splitlines() if "rror" in line), str(error).strip())[:300]
        raise UserError(
            f"{setting}: torch.compile fails here ({why}); set it to false. TORCH_LOGS=+inductor in the environment shows the "
            "whole output"
        ) from None
