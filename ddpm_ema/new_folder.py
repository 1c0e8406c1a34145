"""A folder that appears whole or not at all: how a pipeline folder and an imported run are written."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from ddpm_ema.averaging.files import clear_rests, sync
from ddpm_ema.errors import UserError


def refuse_used(path: Path, option: str) -> None:
    """Raises UserError, which names the command line's `option`, if there is more at `path` than an empty folder."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path}: already holds something; remove it or choose another folder with {option}")


@contextlib.contextmanager
def new_folder(path: Path, option: str) -> Iterator[Path]:
    """A temporary folder beside `path`, synced and renamed to it at the end, deleted if anything goes wrong.

    Raises UserError, which names the command line's `option`, if `path` is used already or cannot be written.
    """
    refuse_used(path, option)
    partial = path.absolute().with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        clear_rests(path)
        partial.mkdir(parents=True)
        yield partial
        for written in (*partial.rglob("*"), partial):
            sync(written)
        os.replace(partial, path)
        sync(path.absolute().parent)
    except (OSError, SafetensorError) as error:  # the latter of a full disk, too
        if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            refuse_used(path, option)
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be written ({reason}); choose another folder with {option}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
