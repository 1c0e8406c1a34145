"""The run directory: the only thing that passes between stages. Files appear whole or not at all.

    checkpoints/step-00003000/   manifest.json (written last), raw.safetensors, optimizer.safetensors, averages/<name>.safetensors
    snapshots/step-00001500/     <name>.safetensors, for post-hoc reconstruction
    samples/  scores/  metrics.jsonl  config.yaml  report.html  imported.json (of a run that was trained elsewhere)

A checkpoint is written into a folder beside its target, synced, and renamed. What a kill leaves behind starts with a dot, is
never read, and is cleared by the next holder of the lock. Order comes from step numbers, never from clocks.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ddpm_ema.averaging.files import HEAD_BYTES, is_pickle, save_tensors
from ddpm_ema.errors import UserError

SCHEMA = 1
STEP_FOLDER = re.compile(r"step-(\d{8,})")
HEARTBEAT_SECONDS = 5.0
KEPT_ASIDE = (
    "checkpoints",
    "snapshots",
    "samples",
    "scores",
    "metrics.jsonl",
    "report.html",
    "config.yaml",
    "imported.json",
)
MADE_OF_A_STEP = ("scores/*", "samples/*", "reconstructed/*")
MADE_AT = re.compile(r"(?:step-)?(\d{8,})")


class CorruptCheckpointError(UserError):
    """A checkpoint that is not whole: names the file and what is wrong with it."""


def step_folder(step: int) -> str:
    """3000 -> 'step-00003000'."""
    return f"step-{step:08d}"


def sync_folder(path: Path) -> None:
    """Makes renames inside `path` survive a power cut. No test can show it, nor what any other fsync here is for."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write(path: Path, data: bytes | str) -> None:
    """Writes `data` to a temporary beside `path`, syncs it and renames it, so that `path` is the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def atomic_save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """`atomic_write` for a safetensors file; tensors are made contiguous (channels-last is not, and would be refused)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save_tensors(temporary, tensors, metadata)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file -> CPU tensors by name. Raises UserError for anything else; a pickle is never opened."""
    _refuse_pickle(path)
    try:
        return load_file(path, device="cpu")
    except (SafetensorError, OSError) as error:
        raise CorruptCheckpointError(f"{path}: not a whole safetensors file ({error})") from None


def _refuse_pickle(path: Path) -> None:
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as error:
        raise CorruptCheckpointError(f"{path}: {error.strerror}") from None
    if is_pickle(head):
        raise UserError(
            f"{path}: is a pickle, which can run code when it is read; refused. Convert it to safetensors first"
        )


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Checkpoint:
    """One folder under checkpoints/. Reading any tensor file checks its sha256 first."""

    def __init__(self, path: Path) -> None:
        self.path = path
        match = STEP_FOLDER.fullmatch(path.name)
        assert match is not None, path
        self.step = int(match[1])

    @cached_property
    def manifest(self) -> dict[str, Any]:
        try:
            manifest = json.loads((self.path / "manifest.json").read_text())
        except OSError as error:
            self._check_still_there()
            raise CorruptCheckpointError(f"{self.path}: no manifest.json ({error.strerror})") from None
        except ValueError as error:
            raise CorruptCheckpointError(f"{self.path}/manifest.json: not JSON ({error})") from None
        if not isinstance(manifest, dict) or manifest.get("step") != self.step or "files" not in manifest:
            raise CorruptCheckpointError(f"{self.path}/manifest.json: does not describe step {self.step}")
        if manifest.get("schema") != SCHEMA:
            raise CorruptCheckpointError(f"{self.path}: schema {manifest.get('schema')}, this version reads {SCHEMA}")
        return manifest

    @property
    def names(self) -> list[str]:
        """`raw` and the averages that this checkpoint holds."""
        averages = [Path(file).stem for file in self.manifest["files"] if file.startswith("averages/")]
        return ["raw", *averages]

    def tensors(self, file: str) -> dict[str, Tensor]:
        """The tensors of one file of this checkpoint, on CPU. Raises CorruptCheckpointError if a single bit differs."""
        self._check(file)
        return read_tensors(self.path / file)

    def weights(self, name: str) -> dict[str, Tensor]:
        """fp32 weights by parameter name, for `raw` or an average."""
        if name not in self.names:
            raise UserError(f"{self.path}: holds no weights {name!r}; there are {', '.join(self.names)}")
        return self.tensors("raw.safetensors" if name == "raw" else f"averages/{name}.safetensors")

    def verify(self) -> None:
        """Raises CorruptCheckpointError that names the first file that is not what was written."""
        for file in self.manifest["files"]:
            self._check(file)

    def _check(self, file: str) -> None:
        path, entry = self.path / file, self.manifest["files"].get(file)
        if entry is None:
            raise CorruptCheckpointError(f"{self.path}: holds no {file}")
        if not path.is_file():
            self._check_still_there()
            raise CorruptCheckpointError(f"{path}: is missing")
        if (size := path.stat().st_size) != entry["bytes"]:
            raise CorruptCheckpointError(f"{path}: {size} bytes, {entry['bytes']} were written")
        if file_sha256(path) != entry["sha256"]:
            _refuse_pickle(path)
            raise CorruptCheckpointError(f"{path}: sha256 mismatch, its content changed after it was written")

    def _check_still_there(self) -> None:
        if not self.path.is_dir():
            raise UserError(
                f"{self.path}: is no longer there. Training deletes old checkpoints while it goes on: raise checkpoints.keep, "
                "keep some for good with checkpoints.keep_every, or use a newer step"
            )


class RunDir:
    """Paths, checkpoints and the lock of one run directory."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.config_path = self.path / "config.yaml"
        self.metrics_path = self.path / "metrics.jsonl"
        self.report_path = self.path / "report.html"
        self.imported_path = self.path / "imported.json"
        self._checkpoints = self.path / "checkpoints"
        self._snapshots = self.path / "snapshots"

    def sample_grid(self, step: int) -> Path:
        return self.path / "samples" / f"{step_folder(step)}.png"

    def score_dir(self, step: int, digest: str) -> Path:
        return self.path / "scores" / f"{step:08d}-{digest}"

    def score_dirs(self) -> list[Path]:
        """Folders of scorings, by step."""
        return sorted(path for path in (self.path / "scores").glob("*-*") if path.is_dir())

    def snapshot_path(self, step: int, name: str) -> Path:
        return self._snapshots / step_folder(step) / f"{name}.safetensors"

    def snapshots(self) -> dict[str, list[Path]]:
        """Average name -> its snapshot files, by step."""
        found: dict[str, list[Path]] = {}
        for folder in _step_folders(self._snapshots):
            for path in sorted(folder.glob("[!.]*.safetensors")):
                found.setdefault(path.stem, []).append(path)
        return found

    def checkpoints(self) -> list[Checkpoint]:
        """Checkpoints that were renamed into place, by step. Their content is checked when it is read."""
        return [Checkpoint(path) for path in _step_folders(self._checkpoints)]

    def checkpoint(self, step: int) -> Checkpoint:
        """The checkpoint of one step. Raises UserError that names the steps there are."""
        for checkpoint in self.checkpoints():
            if checkpoint.step == step:
                return checkpoint
        steps = ", ".join(str(checkpoint.step) for checkpoint in self.checkpoints()) or "none"
        raise UserError(f"{self._checkpoints}: no checkpoint of step {step}; steps there: {steps}")

    def newest_whole(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint whose every file is what was written, and why newer ones were passed over."""
        reasons: list[str] = []
        for checkpoint in reversed(self.checkpoints()):
            try:
                checkpoint.verify()
            except UserError as error:
                reasons.append(str(error))
            else:
                return checkpoint, reasons
        return None, reasons

    def write_checkpoint(
        self, step: int, files: Mapping[str, Mapping[str, Tensor]], manifest: Mapping[str, Any]
    ) -> Checkpoint:
        """Writes `files` (relative path -> tensors) and the manifest; the folder appears whole or not at all.

        Raises UserError with the bytes needed and free when the disk is full; older checkpoints are untouched then.
        """
        target = self._checkpoints / step_folder(step)
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        needed = sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
        with explained(target, needed):
            try:
                partial.mkdir(parents=True)
                _require_space(partial, needed)
                entries = {file: _write_entry(partial, file, tensors) for file, tensors in files.items()}
                whole = {"schema": SCHEMA, "step": step, **manifest, "files": entries}
                atomic_write(partial / "manifest.json", json.dumps(whole, indent=1))
                _move_into_place(partial, target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        return Checkpoint(target)

    def prune(self, keep: int, keep_every: int | None) -> None:
        """Deletes old checkpoints but the newest `keep` (at least two) and those at multiples of `keep_every`."""
        for checkpoint in self.checkpoints()[: -max(2, keep)]:
            if keep_every is None or checkpoint.step % keep_every:
                doomed = checkpoint.path.with_name(f".{checkpoint.path.name}.deleted")
                os.replace(checkpoint.path, doomed)  # a half-deleted folder must not look whole
                shutil.rmtree(doomed, ignore_errors=True)

    def drop_after(self, step: int) -> Path | None:
        """Clears what a run wrote after `step`, where it now goes on.

        Rows of metrics, snapshots and newer (bad) checkpoints are deleted: training writes them again. Scores, sample grids
        and reconstructions of later steps tell of weights that will never be again: they move into `previous-N/`, which is
        returned (None where there are none).
        """
        for checkpoint in self.checkpoints():
            if checkpoint.step > step:
                os.replace(checkpoint.path, checkpoint.path.with_name(f".{checkpoint.path.name}.bad.deleted"))
        for folder in _step_folders(self._snapshots):
            if _step_of(folder) > step:
                shutil.rmtree(folder)
        if self.metrics_path.exists():
            atomic_write(self.metrics_path, "".join(line + "\n" for line in _rows_up_to(self.metrics_path, step)))
        made = [path for pattern in MADE_OF_A_STEP for path in self.path.glob(pattern)]
        return self._set_aside([path for path in made if (at := MADE_AT.match(path.name)) and int(at[1]) > step])

    def move_aside(self) -> Path | None:
        """Moves what an earlier run left into previous-N/; returns that folder, or None where there was nothing."""
        return self._set_aside([self.path / name for name in KEPT_ASIDE if (self.path / name).exists()])

    def _set_aside(self, paths: Sequence[Path]) -> Path | None:
        """Moves `paths` into a new previous-N/, where they lie as they lay here."""
        if not paths:
            return None
        numbers = [p.name.removeprefix("previous-") for p in self.path.glob("previous-*")]
        number = 1 + max((int(n) for n in numbers if n.isdecimal()), default=0)
        aside = self.path / f"previous-{number}"
        for path in paths:
            target = aside / path.relative_to(self.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
        return aside

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Adds one row to metrics.jsonl, whole on disk before the next step begins to be logged."""
        with open(self.metrics_path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def clear_partial(self) -> None:
        """Deletes what kills left behind. Only the holder of the lock may."""
        for folder in (self.path, self._checkpoints, self._snapshots, *_step_folders(self._snapshots)):
            for path in [*folder.glob(".*.partial"), *folder.glob(".*.deleted")]:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the folder for one run. Raises UserError that names host and process of the run that has it."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with _Lock(self.path / ".lock"):
                self.clear_partial()
                yield
        except OSError as error:
            if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.ENOSPC):
                raise UserError(
                    f"output_dir {self.path}: cannot be written ({error.strerror}); choose another folder"
                ) from None
            raise


class _Lock:
    """A record lock that the kernel drops with its process, and for hosts that share no record locks a heartbeat.

    `fcntl.lockf` and not `flock`: data workers are forked, and would inherit a `flock` and hold it after their parent died.
    A file left by another host counts as held while its modification time still changes; no clocks are compared.
    """

    def __init__(self, path: Path, heartbeat: float = HEARTBEAT_SECONDS) -> None:
        self.path, self.heartbeat = path, heartbeat
        self._stop = threading.Event()

    def __enter__(self) -> None:
        self._file = open(self.path, "a+", encoding="utf-8")
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = self._owner()
            self._file.close()
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise self._refusal(owner) from None
            raise
        self._wait_for_other_host()
        self._file.truncate(0)
        json.dump({"host": socket.gethostname(), "pid": os.getpid()}, self._file)
        self._file.flush()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="lock heartbeat")
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._file.truncate(0)  # released: the next one need not wait for a heartbeat
        self._file.close()

    def _owner(self) -> dict[str, Any]:
        self._file.seek(0)
        try:
            return json.loads(self._file.read())
        except ValueError:
            return {}

    def _wait_for_other_host(self) -> None:
        owner = self._owner()
        if not owner or owner.get("host") == socket.gethostname():
            return  # the kernel's word is exact on one host: whoever wrote this is gone
        before = os.stat(self.path).st_mtime_ns
        deadline = time.monotonic() + 3 * self.heartbeat
        while time.monotonic() < deadline:
            time.sleep(self.heartbeat / 5)
            if os.stat(self.path).st_mtime_ns != before:
                self._file.close()
                raise self._refusal(owner)

    def _refusal(self, owner: Mapping[str, Any]) -> UserError:
        who = f"process {owner.get('pid', '?')} on host {owner.get('host', '?')}"
        return UserError(
            f"{self.path.parent}: another run is working in this folder ({who}); stop it or choose another output_dir"
        )

    def _beat(self) -> None:
        while not self._stop.wait(self.heartbeat):
            with contextlib.suppress(OSError):
                os.utime(self.path)


def _step_folders(parent: Path) -> list[Path]:
    folders = [path for path in parent.glob("step-*") if path.is_dir() and STEP_FOLDER.fullmatch(path.name)]
    return sorted(folders, key=_step_of)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _write_entry(folder: Path, file: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path, tensors)
    sync_folder(path.parent)
    return {"sha256": file_sha256(path), "bytes": path.stat().st_size}


def _move_into_place(partial: Path, target: Path) -> None:
    """Renames; what stood there before (a checkpoint that proved bad) leaves in one rename, too."""
    if target.exists():
        os.replace(target, target.with_name(f".{target.name}.{os.getpid()}.deleted"))
    os.replace(partial, target)
    sync_folder(target.parent)
    shutil.rmtree(target.with_name(f".{target.name}.{os.getpid()}.deleted"), ignore_errors=True)


def _require_space(folder: Path, needed: int) -> None:
    if shutil.disk_usage(folder).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextlib.contextmanager
def explained(target: Path, needed: int, kept: str = "Earlier checkpoints are whole") -> Iterator[None]:
    """Turns a failed write of `needed` bytes to `target` into a UserError that says what is there and what to do.

    `kept` is a sentence on what the failure leaves whole.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise _write_error(error, target, needed, kept) from None


def _write_error(error: Exception, target: Path, needed: int, kept: str) -> UserError:
    """safetensors reports a full disk in its own exception, so the space left decides, too."""
    existing = next(p for p in [target, *target.parents] if p.exists())
    free = shutil.disk_usage(existing).free
    if getattr(error, "errno", None) == errno.ENOSPC or "os error 28" in str(error) or free < needed:
        return UserError(
            f"{target}: the disk is full: {needed:,} bytes needed, {free:,} free. {kept}; make room and start again"
        )
    return UserError(f"{target}: cannot be written ({error})")


def _rows_up_to(path: Path, step: int) -> Iterator[str]:
    """Lines of metrics.jsonl up to `step`, without a line that a kill cut short and rows that the next one repeats."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if row.get("step", step + 1) <= step and not row.get("partial"):
                yield line.rstrip("\n")


def tensor_metadata(path: Path) -> dict[str, str]:
    """The text that a safetensors file carries beside its tensors."""
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}
