"""A folder of images, walked in an order that depends on the names alone."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG

import torch
from PIL import Image
from torch import Tensor

from ddpm_ema.data.source import Source
from ddpm_ema.errors import UserError, nearest

_IMAGE_FILE = re.compile(r"\.(png|jpe?g|jpe|jfif|webp|bmp|dib|gif|tiff?|p[pgbn]m|tga|jp2|avif)", re.IGNORECASE)
SPLIT_NAMES = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})  # in any case


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
        beside = sorted(entry.name for entry in path.parent.glob("*") if entry.is_dir())
        near = nearest(path.name, beside, or_all=False)
        raise UserError(f"data.path: {path} {what}: name the folder that holds the images{near}")
    root = path / _split_folder(path, split)
    files, skipped, num_ignored = _walk(root)
    if not files:
        found = f"{num_ignored} other files" if num_ignored else "no files"
        passed = "".join(f"\n  passed over: {line}" for line in skipped[:5])
        raise UserError(
            f"no images under {root} ({found}): data.path must hold .png, .jpg, .webp, .tif or the like{passed}"
        )
    labels, num_classes, classes = _labels([file.relative for file in files])

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
        classes=classes,
        skipped=skipped,
        num_ignored=num_ignored,
    )


def _labels(paths: list[str]) -> tuple[Tensor | None, int | None, str]:
    """A class per folder of the first level, their number, and both in words; no labels where an image lies outside of them."""
    folders = [path.partition("/")[0] for path in paths if "/" in path]
    names = sorted(set(folders), key=os.fsencode)
    shown = printable(", ".join(names[:5])) + ", …" * (len(names) > 5)
    if outside := [path for path in paths if "/" not in path]:
        why = f", because {printable(outside[0])} lies beside the folders {shown}" if names else ""
        return None, None, f"no classes{why}"
    number = {name: label for label, name in enumerate(names)}
    words = f"{len(names)} class{'es' * (len(names) > 1)} ({shown})"
    return torch.tensor([number[name] for name in folders], dtype=torch.int64), len(names), words


def _split_folder(path: Path, split: str) -> str:
    names = {entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
    splits = sorted(name for name in names if name.lower() in SPLIT_NAMES)
    if names and len(splits) == len(names):
        if split not in names:
            raise UserError(f"data.split: {path} has no split {split!r}, only {', '.join(splits)}")
        return split
    if len(splits) > 1:  # as classes they would mix what is held out into the training
        others = ", ".join(sorted(map(printable, names - {*splits}))[:5])
        raise UserError(
            f"data.path: {path} has the splits {', '.join(splits)} beside other folders ({others}): move those elsewhere, or "
            f"give the folder of one split, {path}/{splits[-1]}"
        )
    if split != "train":
        raise UserError(
            f"data.split: {path} is not divided into splits, so there is no {split!r}: put the images into "
            f"{path}/train and {path}/{split}"
        )
    return ""


def _walk(root: Path) -> tuple[list[_File], list[str], int]:
    """The images by relative path as bytes, a line for each that is passed over, and the number of other files."""
    files, skipped, num_ignored = [], list[str](), 0
    above: dict[str, set[tuple[int, int]]] = {}  # of each folder: those on the way to it, by device and inode

    def refuse(error: OSError) -> None:
        raise UserError(f"cannot read the folder {printable(str(error.filename))}: {error.strerror}") from None

    for folder, subfolders, names in os.walk(root, onerror=refuse, followlinks=True):
        here, ancestors = os.stat(folder), above.get(os.path.dirname(folder), set())
        if (here.st_dev, here.st_ino) in ancestors:
            skipped.append(f"{printable(folder)}: a link back to a folder above it")
            subfolders.clear()
            continue
        above[folder] = ancestors | {(here.st_dev, here.st_ino)}
        num_ignored += sum(name.startswith(".") for name in subfolders)
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in names:
            if name.startswith(".") or not _IMAGE_FILE.fullmatch(os.path.splitext(name)[1]):
                num_ignored += 1
            elif isinstance(found := _file(os.path.join(folder, name), root), str):
                skipped.append(found)
            else:
                files.append(found)
    return sorted(files, key=lambda file: os.fsencode(file.relative)), skipped, num_ignored


def _file(path: str, root: Path) -> _File | str:
    """The file, or why it is passed over."""
    try:
        stat = os.stat(path)
    except OSError as error:
        return f"{printable(path)}: {'a broken link' if os.path.islink(path) else error.strerror}"
    if not S_ISREG(stat.st_mode):  # opening a named pipe would wait for ever
        return f"{printable(path)}: not a regular file"
    return _File(os.path.relpath(path, root), stat.st_size, stat.st_mtime_ns)


def printable(path: str) -> str:
    """A path as a terminal can show it: bytes that are not UTF-8 and control characters are escaped."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
