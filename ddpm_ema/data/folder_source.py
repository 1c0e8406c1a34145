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

from ddpm_ema.errors import UserError

_IMAGE_FILE = re.compile(r"\.(png|jpe?g|jpe|jfif|webp|bmp|dib|gif|tiff?|p[pgbn]m|tga|jp2|avif)", re.IGNORECASE)
SPLIT_NAMES = frozenset({"train", "training", "val", "valid", "validation", "test"})


@dataclass(frozen=True)
class _File:
    relative: str  # with forward slashes, from the folder that was named
    size: int  # bytes
    modified: int  # nanoseconds


@dataclass
class FolderSource:
    """Every image under `root`, links followed, sorted by relative path as bytes.

    The first level of folders gives the labels (sorted as bytes, from 0); an image outside of them leaves all without labels.
    """

    root: Path
    name: str
    files: list[_File]
    skipped: list[str]
    num_ignored: int
    labels: Tensor | None = None
    num_classes: int | None = None

    def __post_init__(self) -> None:
        parts = [file.relative.split("/") for file in self.files]
        if all(len(part) > 1 for part in parts):
            classes = sorted({part[0] for part in parts}, key=os.fsencode)
            number = {name: label for label, name in enumerate(classes)}
            self.labels = torch.tensor([number[part[0]] for part in parts], dtype=torch.int64)
            self.num_classes = len(classes)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> Image.Image:
        with Image.open(self.root / self.files[index].relative) as image:
            image.load()
        return image

    def where(self, index: int) -> str:
        return printable(str(self.root / self.files[index].relative))

    def listing(self) -> list[str]:
        return [f"{file.relative}\t{file.size}" for file in self.files]

    def stamp(self) -> list[str]:
        return [str(self.root.resolve()), *(f"{f.relative}\t{f.size}\t{f.modified}" for f in self.files)]


def open_folder(path: Path, split: str) -> FolderSource:
    """Opens the images under `path`, or under `path/split` if the folder's first level holds only splits.

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
    return FolderSource(root, printable(path.name or str(path)), files, walk.skipped, walk.num_ignored)


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
