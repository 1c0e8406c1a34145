"""torch.compile on machines that stop programs: libraries cut off in its cache, stops while it compiles, one message where it fails.

A program that is killed while the linker writes leaves a cut-off library in torch's cache. torch finds it there at every later
start, and loading it ends the program, by a signal if need be; so it is looked for and deleted before anything is compiled.
"""

from __future__ import annotations

import contextlib
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ddpm_ema.distributed import StopFlag
from ddpm_ema.errors import StoppedError, UserError
from ddpm_ema.messages import logger

LINKING_SECONDS = 10.0
"""A library that was written to this recently may be another program's, whose linker is at work."""


def prepare(setting: str, tell: Callable[[str], object] = logger.info) -> None:
    """Call before the first compiled call: says that it takes long, and deletes cut-off libraries from torch's cache.

    Args:
        setting: key path of the setting that switches compiling on, for the message.
        tell: takes a line for the user; ranks but the first are silent.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    for path in Path(cache_dir()).rglob("*.so"):
        if _is_cut_off(path):
            path.unlink(missing_ok=True)
            tell(f"{path}: was cut off by a kill while torch.compile wrote it; deleted, to be compiled again")
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
    """Whether the file reaches to the end of its table of sections, which linkers write last (64-bit ELF)."""
    with open(path, "rb") as file:
        header = file.read(64)
    if len(header) < 64 or header[:5] != b"\x7fELF\x02":
        return False
    (offset,), (entry, number) = struct.unpack_from("<Q", header, 0x28), struct.unpack_from("<HH", header, 0x3A)
    return offset > 0 and offset + entry * number <= path.stat().st_size


@contextlib.contextmanager
def explained(setting: str, stop: StopFlag | None = None) -> Iterator[None]:
    """Around calls that may compile: turns torch's errors into one message.

    Args:
        setting: key path of the setting that switches compiling on.
        stop: whether a stop was asked for; signals that go to the whole process group kill the compiler first.

    Raises:
        StoppedError: a stop was asked for while it compiled.
        UserError: the network cannot be compiled here.
    """
    try:
        yield
    except Exception as error:
        # By the name of its class, whose import takes seconds.
        if all(base.__name__ != "TorchDynamoException" for base in type(error).__mro__):
            raise
        if stop is not None and stop.requested:
            raise StoppedError(f"stopped by {stop.reason} while torch.compile worked; start again") from None
        why = next((line for line in str(error).splitlines() if "rror" in line), str(error).strip())[:300]
        raise UserError(
            f"{setting}: torch.compile fails here ({why}); set it to false. TORCH_LOGS=+inductor in the environment shows the "
            "whole output"
        ) from None
