"""A folder of images, walked in an order that depends on the names alone."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISREG

import torch
from PIL import Image
from torch import Tensor

from ddpm_ema.data.source import Source
from ddpm_ema.errors import UserError

_IMAGE_FILE = re.compile(r"\.(png|jpe?g|jpe|jfif|webp|bmp|dib|gif|tiff?|p[pgbn]m|tga|jp2|avif)", re.IGNORECASE)
SPLIT_NAMES = frozenset({"train", "training", "val", "valid", "validation", "test"})


@dataclass(frozen=True)
class _File:
    relative: str  # with forward slashes, from the folder that was named
    size: int  # bytes
    modified: int  # nanoseconds


def open_folder(path: Path, split: str) -> Source:
    """Every image under `path`, or under `path/split` if its first level holds only splits; sorted by relative path as bytes.

    Links are followed. The first level of folders gives the labels (sorted as bytes, from 0); an image outside of them leaves all
    without labels.

    Raises:
        UserError: there is no such folder or split, it cannot be read, or it holds no image.
    """
    if not path.is_dir():
        what = "is not a folder" if path.exists() else "does not exist"
        raise UserError(f"data.path: {path} {what}: name the folder that holds the images")
    root = path / _split_folder(path, split)
    walk = _Walk(root)
    files = sorted(walk.files(), key=lambda file: os.fsencode(file.relative))
    if not files:
        found = f"{walk.num_ignored} other files" if walk.num_ignored else "no files"
        passed = "".join(f"\n  passed over: {line}" for line in walk.skipped[:5])
        raise UserError(
            f"no images under {root} ({found}): data.path must hold .png, .jpg, .webp, .tif or the like{passed}"
        )
    labels, num_classes = _labels([file.relative for file in files])

    def read(index: int) -> Image.Image:
        with Image.open(root / files[index].relative) as image:
            image.load()
        return image

    return Source(
        name=printable(path.name or str(path)),
        size=len(files),
        read=read,
        where=lambda index: printable(str(root / files[index].relative)),
        stamp=[str(root.resolve()), *(f"{file.relative}\t{file.size}\t{file.modified}" for file in files)],
        labels=labels,
        num_classes=num_classes,
        skipped=walk.skipped,
        num_ignored=walk.num_ignored,
    )


def _labels(paths: list[str]) -> tuple[Tensor | None, int | None]:
    """A class per folder of the first level, and their number; None and None where an image lies outside of them."""
    folders = [path.partition("/")[0] for path in paths if "/" in path]
    if len(folders) < len(paths):
        return None, None
    number = {name: label for label, name in enumerate(sorted(set(folders), key=os.fsencode))}
    return torch.tensor([number[name] for name in folders], dtype=torch.int64), len(number)


def _split_folder(path: Path, split: str) -> str:
    names = {entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
    if names and names <= SPLIT_NAMES:
        if split not in names:
            raise UserError(f"data.split: {path} has no split {split!r}, only {', '.join(sorted(names))}")
        return split
    if split != "train":
        raise UserError(
            f"data.split: {path} is not divided into splits, so there is no {split!r}: put the images into "
            f"{path}/train and {path}/{split}"
        )
    return ""


@dataclass
class _Walk:
    """One walk over a folder: yields its images, collects what it skips."""

    root: Path
    skipped: list[str] = field(default_factory=list)
    num_ignored: int = 0

    def files(self, relative: str = "", above: tuple[tuple[int, int], ...] = ()) -> Iterator[_File]:
        """`above` holds (device, inode) of the folders on the way here: a link back to one of them is a loop."""
        folder = self.root / relative
        try:
            here = os.stat(folder)
            if (here.st_dev, here.st_ino) in above:
                self.skipped.append(f"{printable(str(folder))}: a link back to a folder above it")
                return
            entries = list(os.scandir(folder))
        except OSError as error:
            raise UserError(f"cannot read the folder {printable(str(folder))}: {error.strerror}") from None
        for entry in entries:
            inside = f"{relative}/{entry.name}" if relative else entry.name
            if entry.name.startswith("."):
                self.num_ignored += 1
            elif _is_folder(entry):
                yield from self.files(inside, (*above, (here.st_dev, here.st_ino)))
            else:
                yield from self._file(entry, inside)

    def _file(self, entry: os.DirEntry[str], relative: str) -> Iterator[_File]:
        if not _IMAGE_FILE.fullmatch(os.path.splitext(entry.name)[1]):
            self.num_ignored += 1
            return
        try:
            stat = entry.stat()
        except OSError as error:
            what = "a broken link" if entry.is_symlink() else error.strerror
            self.skipped.append(f"{printable(entry.path)}: {what}")
            return
        if not S_ISREG(stat.st_mode):  # opening a named pipe would wait for ever
            self.skipped.append(f"{printable(entry.path)}: not a regular file")
            return
        yield _File(relative, stat.st_size, stat.st_mtime_ns)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def printable(path: str) -> str:
    """A path as a terminal can show it: bytes that are not UTF-8 and control characters are escaped."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
