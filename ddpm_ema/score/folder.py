"""The table of one scoring on disk, `scores/<step>-<digest of the samples>-<digest of the scoring>/`.

docs/scoring.md lists its files. Images and features lie in `scores/<step>-<digest of the samples>/`: see `sampled`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ddpm_ema.config import EvaluationSettings
from ddpm_ema.image_grid import save_grid, save_rows
from ddpm_ema.metrics import Estimate
from ddpm_ema.rundir import as_user_error, atomic_write
from ddpm_ema.score.feature_store import KEPT
from ddpm_ema.score.rows import Score


@dataclass
class Record:
    """One set of weights, by the key of its content: its figures over some numbers of images.

    `names` are those it was asked for by; a candidate of a sweep alone has none. `candidate` says what a sweep makes of it:
    `kind` (std, decay or cooldown), `value`, `num_images` that it is compared over (0: no search looked at it), and `looks`.
    """

    key: str
    name: str
    profile: dict[str, Any] | None
    names: list[str] = field(default_factory=list)
    candidate: dict[str, Any] | None = None
    rows: dict[int, dict[str, Any]] = field(default_factory=dict)
    estimates: dict[int, Estimate] = field(default_factory=dict)

    def score(self, count: int) -> Score | None:
        """Over its first `count` images, where that was finished."""
        return Score(self.rows[count], self.estimates[count]) if count in self.rows else None

    def to_json(self) -> str:
        estimates = {count: estimate.to_dict() for count, estimate in self.estimates.items()}
        return json.dumps({**vars(self), "estimates": estimates}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Record:
        """What `to_json` gave. Raises ValueError, KeyError or TypeError for anything else."""
        value = json.loads(text)
        value["rows"] = {int(count): row for count, row in value["rows"].items()}
        value["estimates"] = {int(count): Estimate.from_dict(e) for count, e in value["estimates"].items()}
        return cls(**value)


class ScoreFolder:
    """One `scores/<step>-<digest>-<digest>/`, held by the lock of the `Sampled` folder: read once, written when something changes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.results_path, self.grid_path = path / "results.json", path / "grid.png"
        found = [_read(file) for file in path.glob("weights/*.json")]
        self._records = {record.key: record for record in found if record is not None}

    def record(self, key: str) -> Record | None:
        """None where nothing is known of these weights, or the file was damaged."""
        return self._records.get(key)

    def records(self) -> list[Record]:
        """All of them, of any training, by key."""
        return sorted(self._records.values(), key=lambda record: record.key)

    def keep(self, record: Record) -> None:
        self._records[record.key] = record
        self._write(self.path / "weights" / f"{record.key[:16]}.json", record.to_json())

    def forget(self) -> None:
        """What it holds was moved elsewhere."""
        self._records.clear()

    def results(self) -> dict[str, Any]:
        """results.json, or {} where there is none that can be read."""
        try:
            found = json.loads(self.results_path.read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def write(
        self, results: Mapping[str, Any], images: Mapping[str, Tensor], step: int, evaluation: EvaluationSettings
    ) -> None:
        """results.json, and grid.png with a labelled row of `images` (name -> uint8 `[n, C, H, W]`)."""
        if images:
            with as_user_error(self.grid_path, sum(some.nbytes for some in images.values()), KEPT):
                save_grid(self.grid_path, images, step, evaluation)
        self._write(self.results_path, json.dumps(results, indent=1, allow_nan=False))

    def nearest_path(self, key: str, count: int) -> Path:
        """Of the training images nearest to the first `count` images of the weights with this key."""
        return self.path / "nearest" / f"{key[:16]}-{count}.png"

    def keep_nearest(self, key: str, name: str, images: Tensor, title: str) -> None:
        """A picture with one row, uint8 `[n, C, H, W]`."""
        path = self.nearest_path(key, len(images))
        with as_user_error(path, images.nbytes, KEPT):
            save_rows(path, {name: images}, title)

    def _write(self, path: Path, text: str) -> None:
        with as_user_error(path, len(text), KEPT):
            atomic_write(path, text)


def _read(path: Path) -> Record | None:
    try:
        return Record.from_json(path.read_text())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
