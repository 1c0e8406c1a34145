"""Files of a run: written whole or not at all, checked when they are read, with a message when the disk is full.

Tensors are written by `averaging.files.save_tensors`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from ddpm_ema.averaging.files import open_safetensors, replacing
from ddpm_ema.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def atomic_write(path: Path, data: bytes | str) -> None:
    """Writes `data` to `path`, which is the old file or the new one at any time."""
    with replacing(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads a safetensors file: CPU tensors by name.

    Raises:
        UserError: it cannot be read, is no whole safetensors file, or is a pickle, which is refused unread.
    """
    try:
        with open_safetensors(path) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except ValueError as error:
        raise UserError(str(error)) from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_space(folder: Path, needed: int) -> None:
    """Raises the OSError of a full disk where fewer than `needed` bytes are free."""
    if shutil.disk_usage(folder).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextlib.contextmanager
def as_user_error(target: Path, needed: int, kept: str = "Earlier checkpoints are whole") -> Iterator[None]:
    """Turns a failed write of `needed` bytes to `target` into a UserError that says how much is free and what to do.

    `kept` is a sentence on what the failure leaves whole.
    """
    try:
        yield
    except OSError as error:
        free = shutil.disk_usage(next(p for p in [target, *target.parents] if p.exists())).free
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"{target}: the disk is full: {needed:,} bytes needed, {free:,} free. {kept}; make room and start again"
            ) from None
        raise UserError(f"{target}: cannot be written ({error})") from None


def refuse_used(path: Path, option: str) -> None:
    """Raises UserError, which names the command line's `option`, if there is more at `path` than an empty folder."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path}: already holds something; remove it or choose another folder with {option}")


@contextlib.contextmanager
def new_folder(path: Path, option: str) -> Iterator[Path]:
    """A temporary folder that becomes `path` at the end, whole or not at all: a pipeline folder, an imported run.

    Raises UserError, which names the command line's `option`, if `path` is used already or cannot be written.
    """
    refuse_used(path, option)
    try:
        with replacing(path.absolute(), folder=True) as partial:
            yield partial
    except (OSError, SafetensorError) as error:  # the latter of a full disk, too
        if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            refuse_used(path, option)
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be written ({reason}); choose another folder with {option}") from None
