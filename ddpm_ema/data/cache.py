"""Decoded images in one file, mapped into memory: decoded once on a machine, shared by all its processes.

    <cache_dir>/images/<name>-<key>/
      images.u8      uint8 [N, C, size, size], row after row
      meta.json      shape, fingerprint, unreadable images

The key covers the source's stamp and the conversion, so changed files give another folder; the pixels must have the sha256 that
meta.json names, or they are decoded again. A folder appears whole (a temporary one beside it is renamed) or not at all; a lock
lets one process decode while the others wait for it.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm_ema.averaging.files import sync
from ddpm_ema.data import convert
from ddpm_ema.data.convert import Conversion
from ddpm_ema.data.decode import Decoding, Pixels, check_bad
from ddpm_ema.data.source import Source
from ddpm_ema.errors import UserError
from ddpm_ema.rundir import atomic_write

_HASHED_AT_ONCE = 4096  # images


@dataclass(frozen=True)
class Cached:
    """Decoded images, (index, reason) of the unreadable ones, and the sha256 of all."""

    images: Tensor  # uint8 [N, C, size, size]
    bad: list[tuple[int, str]]
    fingerprint: str


def _digest_settings(conversion: Conversion) -> dict[str, Any]:
    """The part of a fingerprint that says how pixels were made."""
    return {"version": convert.VERSION, **asdict(conversion)}


class Fingerprint:
    """sha256 of the conversion, the decoded pixels in order, and the labels."""

    def __init__(self, conversion: Conversion) -> None:
        self._hash = hashlib.sha256(json.dumps(_digest_settings(conversion), sort_keys=True).encode())

    def update(self, pixels: Pixels) -> None:
        if len(pixels):
            self._hash.update(pixels.data)

    def hexdigest(self, labels: Tensor | None) -> str:
        if labels is not None:
            self._hash.update(b"labels" + labels.numpy().tobytes())
        return self._hash.hexdigest()


def kept(source: Source, bad: list[tuple[int, str]]) -> tuple[Tensor, Tensor | None]:
    """Of the images that are not `bad`: indices in the source, and labels if there are any, int64 `[n]` each."""
    keep = torch.ones(len(source), dtype=torch.bool)
    keep[[index for index, _ in bad]] = False
    indices = keep.nonzero()[:, 0]
    return indices, None if source.labels is None else source.labels[indices]


def open_cached(source: Source, conversion: Conversion, max_bad: int, cache_dir: Path) -> Cached:
    """The images of `source`, mapped from a file, which is written first if it does not exist.

    Raises:
        UserError: too many images are unreadable, the folder cannot be written, or the disk is full.
    """
    stamp = [json.dumps(_digest_settings(conversion), sort_keys=True), *source.stamp]
    key = hashlib.sha256("\n".join(stamp).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    folder = cache_dir / "images" / f"{re.sub(r'[^A-Za-z0-9_-]+', '_', source.name)[:40]}-{key}"
    try:
        found = _read(folder, source, conversion)
        if found is None:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _locked(folder.with_suffix(".lock")):
                found = _read(folder, source, conversion)  # another process may have made it meanwhile
                for partial in folder.parent.glob(f"{folder.name}.tmp-*"):  # left by a kill
                    shutil.rmtree(partial, ignore_errors=True)
                if found is None:
                    _write(folder, source, conversion, max_bad)
                    found = _read(folder, source, conversion)
    except OSError as error:
        existing = next(parent for parent in folder.absolute().parents if parent.exists())
        space = shutil.disk_usage(existing).free
        needed = len(source) * conversion.channels * conversion.size**2
        raise UserError(
            f"cannot keep decoded images in {cache_dir}: {error.strerror} ({needed:,} bytes needed, {space:,} free): "
            "set data.cache_dir to a folder with room, or data.storage to memory"
        ) from None
    assert found is not None
    check_bad(source, found.bad, max_bad)
    return found


def _read(folder: Path, source: Source, conversion: Conversion) -> Cached | None:
    """The content of the folder; None if it is missing, not whole, or its pixels are not those that were decoded."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        count, fingerprint = int(meta["count"]), str(meta["fingerprint"])
        bad = [(int(index), str(why)) for index, why in meta["bad"]]
        size = (folder / "images.u8").stat().st_size
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None
    channels, height, width = conversion.shape
    if size != count * channels * height * width:
        return None
    if count == 0:
        return Cached(torch.empty(0, *conversion.shape, dtype=torch.uint8), bad, fingerprint)
    mapped = np.memmap(folder / "images.u8", np.uint8, "r", shape=(count, channels, height, width))
    # torch warns of what cannot be written to; a mapping that can be would have to fit into memory.
    with warnings.catch_warnings(action="ignore"):
        images = torch.from_numpy(mapped)
    content = Fingerprint(conversion)
    for pixels in images.split(_HASHED_AT_ONCE):
        content.update(pixels.numpy())
    whole = content.hexdigest(kept(source, bad)[1]) == fingerprint
    return Cached(images, bad, fingerprint) if whole else None


def _write(folder: Path, source: Source, conversion: Conversion, max_bad: int) -> None:
    temporary = folder.with_suffix(f".tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        decoding, fingerprint, count = Decoding(source, conversion, max_bad), Fingerprint(conversion), 0
        with open(temporary / "images.u8", "wb") as file:
            for pixels in decoding:
                file.write(pixels.data)
                fingerprint.update(pixels)
                count += len(pixels)
        sync(temporary / "images.u8")
        meta = {
            "schema": 1,
            "name": source.name,
            "count": count,
            **_digest_settings(conversion),
            "bad": decoding.bad,
            "fingerprint": fingerprint.hexdigest(kept(source, decoding.bad)[1]),
        }
        atomic_write(temporary / "meta.json", json.dumps(meta, indent=1))
        shutil.rmtree(folder, ignore_errors=True)  # one that was not whole
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds an advisory lock, if the file system has them; without one the rename still keeps the folder whole.

    A link is not followed: in a folder that others may write to, it could name any file.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
