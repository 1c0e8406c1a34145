"""One checkpoint: a folder of safetensors files with a manifest that holds their sizes and hashes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpm_ema.errors import UserError
from ddpm_ema.rundir.files import file_sha256, read_tensors
from ddpm_ema.rundir.layout import buffers_file, step_of, weights_file

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA = 1
FILE = re.compile(r"((averages|buffers)/)?[\w-]+\.safetensors")


class Checkpoint:
    """One folder under checkpoints/. Reading any tensor file checks its sha256 first."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.step = step_of(path)

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """What was written beside the tensors. Raises UserError where it is missing, damaged or of another version."""
        try:
            manifest = json.loads((self.path / "manifest.json").read_text())
        except OSError as error:
            self._check_still_there()
            raise UserError(f"{self.path}: no manifest.json ({error.strerror})") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.path}/manifest.json: not JSON ({error})") from None
        if not isinstance(manifest, dict) or manifest.get("step") != self.step or not _lists_files(manifest):
            raise UserError(f"{self.path}/manifest.json: does not describe step {self.step}")
        if manifest.get("schema") != SCHEMA:
            raise UserError(f"{self.path}: schema {manifest.get('schema')}, this version reads {SCHEMA}")
        return manifest

    @property
    def names(self) -> list[str]:
        """`raw` and the averages that this checkpoint holds."""
        averages = [Path(file).stem for file in self.manifest["files"] if file.startswith("averages/")]
        return ["raw", *averages]

    def tensors(self, file: str) -> dict[str, Tensor]:
        """The tensors of one file of this checkpoint, on CPU. Raises UserError if a single bit differs."""
        self._check(file)
        return read_tensors(self.path / file)

    def weights(self, name: str) -> dict[str, Tensor]:
        """fp32 parameters and buffers by name, for `raw` or an average."""
        if name not in self.names:
            raise UserError(f"{self.path}: holds no weights {name!r}; there are {', '.join(self.names)}")
        buffers = buffers_file(name)
        return self.tensors(weights_file(name)) | (self.tensors(buffers) if buffers in self.manifest["files"] else {})

    def verify(self) -> None:
        """Raises UserError that names the first file that is not what was written."""
        for file in self.manifest["files"]:
            self._check(file)

    def _check(self, file: str) -> None:
        path, entry = self.path / file, self.manifest["files"].get(file)
        if entry is None:
            raise UserError(f"{self.path}: holds no {file}")
        if not path.is_file():
            self._check_still_there()
            raise UserError(f"{path}: is missing")
        if (size := path.stat().st_size) != entry["bytes"]:
            raise UserError(f"{path}: {size} bytes, {entry['bytes']} were written")
        try:
            sha256 = file_sha256(path)
        except OSError as error:  # of another user, or a disk that fails
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        if sha256 != entry["sha256"]:
            raise UserError(f"{path}: sha256 mismatch, its content changed after it was written")

    def _check_still_there(self) -> None:
        if not self.path.is_dir():
            raise UserError(
                f"{self.path}: is no longer there. Training deletes old checkpoints while it goes on: raise checkpoints.keep, "
                "keep some for good with checkpoints.keep_every, or use a newer step"
            )


def _lists_files(manifest: Mapping[str, Any]) -> bool:
    """Whether it names files as checkpoints have them, each with size and sha256; a stranger's may lead anywhere."""
    files = manifest.get("files")
    return isinstance(files, dict) and all(
        FILE.fullmatch(name) and isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys()
        for name, entry in files.items()
    )
