"""What a run does with its directory: finds, writes and deletes checkpoints, appends metrics, sets old results aside."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpm_ema.averaging.files import no_follow, remove, replacing, save_tensors, sync
from ddpm_ema.errors import UserError
from ddpm_ema.messages import logger
from ddpm_ema.rundir.checkpoint import SCHEMA, Checkpoint
from ddpm_ema.rundir.files import as_user_error, atomic_write, file_sha256, require_space
from ddpm_ema.rundir.layout import step_folder, step_folders, step_of
from ddpm_ema.rundir.lock import Lock

if TYPE_CHECKING:
    from torch import Tensor

OF_ONE_RUN = "checkpoints snapshots samples scores reconstructed metrics.jsonl report.html config.yaml imported.json"
OF_THE_HOLDER = ("checkpoints", "snapshots", "samples", "weights")  # the last of a scoring
LEFTOVER = re.compile(r"\..*\.(partial|deleted)|\.tmp\w{6}")  # safetensors writes into .tmpXXXXXX
OF_ONE_STEP = ("scores/*", "samples/*", "reconstructed/*")
STEP_IN_NAME = re.compile(r"(?:step-)?(\d{8,})")
REFUSALS = "EROFS EACCES EPERM ENOTDIR EEXIST ENOSPC EDQUOT ELOOP"
UNWRITABLE = {getattr(errno, name) for name in REFUSALS.split()}


class RunDir:
    """One run directory: where everything lies in it, its checkpoints, and its lock. Making this object reads and writes nothing."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.config_path = self.path / "config.yaml"
        self.metrics_path = self.path / "metrics.jsonl"
        self.imported_path = self.path / "imported.json"
        self.checkpoints_path = self.path / "checkpoints"
        self.snapshots_path = self.path / "snapshots"

    def sample_grid(self, step: int) -> Path:
        return self.path / "samples" / f"{step_folder(step)}.png"

    def score_dir(self, step: int, digest: str) -> Path:
        return self.path / "scores" / f"{step:08d}-{digest}"

    def snapshot_path(self, step: int, name: str) -> Path:
        return self.snapshots_path / step_folder(step) / f"{name}.safetensors"

    def snapshots(self) -> dict[str, list[Path]]:
        """Average name -> its snapshot files, by step."""
        found: dict[str, list[Path]] = {}
        for folder in step_folders(self.snapshots_path):
            for path in sorted(folder.glob("[!.]*.safetensors")):
                found.setdefault(path.stem, []).append(path)
        return found

    def checkpoints(self) -> list[Checkpoint]:
        """Checkpoints that were renamed into place, by step. Their content is checked when it is read."""
        return [Checkpoint(path) for path in step_folders(self.checkpoints_path)]

    def checkpoint(self, step: int) -> Checkpoint:
        """The checkpoint of one step. Raises UserError that lists the steps that have one."""
        checkpoints = {checkpoint.step: checkpoint for checkpoint in self.checkpoints()}
        if step not in checkpoints:
            steps = ", ".join(map(str, checkpoints)) or "none"
            raise UserError(f"{self.checkpoints_path}: no checkpoint of step {step}; steps there: {steps}")
        return checkpoints[step]

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

    def newest_usable(self, advice: str = "") -> Checkpoint | None:
        """The newest whole checkpoint, None if there is none at all; newer ones that are not whole are named in warnings.

        Raises:
            UserError: there are checkpoints, and none is whole; the message ends with `advice`.
        """
        checkpoint, reasons = self.newest_whole()
        if checkpoint is None and reasons:
            lines = "\n  ".join(reasons)
            raise UserError(f"{self.path}: no checkpoint is whole:\n  {lines}" + (f"\n{advice}" if advice else ""))
        for reason in reasons:
            logger.warning(f"passed over a checkpoint that is not whole: {reason}")
        return checkpoint

    def write_checkpoint(
        self, step: int, files: Mapping[str, Mapping[str, Tensor]], manifest: Mapping[str, Any]
    ) -> Checkpoint:
        """Writes the checkpoint of `step`, which appears whole or not at all; one that proved bad may be there already.

        `files`: relative path -> tensors by name; `manifest`: what manifest.json holds beside schema, step and files. Raises
        UserError where the disk is full (with the bytes needed and free) or cannot be written. No other checkpoint is touched.
        """
        target, entries = self.checkpoints_path / step_folder(step), {}
        needed = sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
        with as_user_error(target, needed), replacing(target, folder=True) as partial:
            require_space(partial, needed)
            for file, tensors in files.items():
                path = partial / file
                save_tensors(path, tensors)
                entries[file] = {"sha256": file_sha256(path), "bytes": path.stat().st_size}
            if self.metrics_path.exists():  # whoever goes on from here has the rows before, also after a power cut
                sync(self.metrics_path)
            whole = {"schema": SCHEMA, "step": step, **manifest, "files": entries}
            atomic_write(partial / "manifest.json", json.dumps(whole, indent=1))
            remove(target)  # which was of no use
        return Checkpoint(target)

    def prune(self, keep: int, keep_every: int | None) -> None:
        """Deletes old checkpoints but the newest `keep` (at least two) and those at multiples of `keep_every`."""
        for checkpoint in self.checkpoints()[: -max(2, keep)]:
            if keep_every is None or checkpoint.step % keep_every:
                doomed = checkpoint.path.with_name(f".{checkpoint.path.name}.deleted")
                os.replace(checkpoint.path, doomed)  # a half-deleted folder must not look whole
                shutil.rmtree(doomed, ignore_errors=True)

    def drop_after(self, step: int) -> Path | None:
        """Removes what a run wrote after `step`, from which it is trained again.

        Rows of metrics, snapshots and newer (bad) checkpoints are deleted: training writes them again. Scores, sample grids
        and reconstructions of later steps are of weights that will not exist again: they move into `previous-N/`, which is
        returned (None where nothing moved).
        """
        for checkpoint in self.checkpoints():
            if checkpoint.step > step:
                os.replace(checkpoint.path, checkpoint.path.with_name(f".{checkpoint.path.name}.bad.deleted"))
        for folder in step_folders(self.snapshots_path):
            if step_of(folder) > step:
                shutil.rmtree(folder)
        if self.metrics_path.exists():
            atomic_write(self.metrics_path, "".join(line + "\n" for line in _rows_up_to(self.metrics_path, step)))
        made = [path for pattern in OF_ONE_STEP for path in self.path.glob(pattern)]
        return self._set_aside([path for path in made if (at := STEP_IN_NAME.match(path.name)) and int(at[1]) > step])

    def move_aside(self) -> Path | None:
        """Moves the files of an earlier run into previous-N/; returns that folder, or None where nothing moved."""
        return self._set_aside([self.path / name for name in OF_ONE_RUN.split() if (self.path / name).exists()])

    def _set_aside(self, paths: Sequence[Path]) -> Path | None:
        """Moves `paths` into a new previous-N/, each to the same relative path."""
        if not paths:
            return None
        numbers = [p.name.removeprefix("previous-") for p in self.path.glob("previous-*")]
        number = 1 + max((int(n) for n in numbers if n.isdecimal()), default=0)
        aside = self.path / f"previous-{number}"
        for path in paths:
            target = aside / path.relative_to(self.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(path, target)  # samples/ may be a link to another file system
        return aside

    def last_stored_step(self) -> int:
        """The highest step of metrics and snapshots; 0 if there are none."""
        rows = _rows_up_to(self.metrics_path, sys.maxsize) if self.metrics_path.exists() else ()
        steps = [json.loads(line)["step"] for line in rows]
        return max([*steps, *map(step_of, step_folders(self.snapshots_path))], default=0)

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Adds one row to metrics.jsonl."""
        with open(self.metrics_path, "a", encoding="utf-8", opener=no_follow) as file:
            file.write(json.dumps(row) + "\n")

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the folder for one run; what killed runs left is deleted, and a write here that fails is one message.

        Raises UserError that names host and process of the run that has the folder, or says why it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with Lock(self.path / ".lock"):
                self._clear_leftovers()
                yield
        except OSError as error:
            if error.errno == errno.ENOENT and not self.path.is_dir():
                raise UserError(f"output_dir {self.path}: is no longer there; move it back and start again") from None
            where = Path(error.filename or self.path)  # a write to a full disk names no file
            if error.errno not in UNWRITABLE or not (where.is_relative_to(self.path) or where in self.path.parents):
                raise
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            what = "make room and start again" if full else "choose another folder (to score: evaluation.output)"
            raise UserError(f"output_dir {self.path}: cannot be written ({error.strerror}); {what}") from None

    def _clear_leftovers(self) -> None:
        """Deletes what killed processes left in folders that only the holder of the lock writes to."""
        for path in [path for name in OF_THE_HOLDER for path in (self.path / name).rglob(".*")]:
            if LEFTOVER.fullmatch(path.name):
                remove(path)


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
