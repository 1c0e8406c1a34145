"""What a scoring keeps on disk, under `scores/<step>-<settings digest>/`.

weights/<first digits of their sha256>/score.json              rows and estimates of one set of weights
                                       features-*.safetensors  of its images, and the first images themselves
made_with.json       versions and devices that its images were sampled with: more than one where they gave the same images
results.json  grid.png       written anew from all that at every start
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ddpm_ema.config import EvaluationSettings
from ddpm_ema.image_grid import save_grid
from ddpm_ema.metrics import Estimate, installed_version
from ddpm_ema.rundir import as_user_error, atomic_write
from ddpm_ema.score.feature_store import KEPT, FeatureStore, first_images
from ddpm_ema.score.rows import Score


@dataclass
class Record:
    """One set of weights, by the key of its content: its figures over some numbers of images.

    `names` are those it was asked for by; a candidate of a sweep alone has none. `candidate` says what a sweep makes of it:
    `kind` (std, decay or cooldown), `value`, and `num_images` that it is compared over.
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


def made_with(device: torch.device) -> dict[str, str]:
    """What images and features may depend on beside the settings: versions, and the device with the kernels it chooses."""
    found = {package: installed_version(package) for package in ("ddpm_ema", "diffusers", "numpy", "torch-fidelity")}
    found["torch"] = str(torch.__version__)  # says which build, too
    cpu = f"cpu, {torch.backends.cpu.get_cpu_capability()}"
    return {**found, "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu}


class ScoreFolder:
    """One `scores/<step>-<digest>/`. Whoever opens it holds its lock: records are read once, and written when they change."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.results_path, self.grid_path = path / "results.json", path / "grid.png"
        found = [_read(file) for file in path.glob("weights/*/score.json")]
        self._records = {record.key: record for record in found if record is not None}
        self._stores: dict[str, FeatureStore] = {}

    def folder(self, key: str) -> Path:
        return self.path / "weights" / key[:16]

    def store(self, key: str) -> FeatureStore:
        """Features of the weights with this key."""
        if key not in self._stores:
            self._stores[key] = FeatureStore(self.folder(key))
        return self._stores[key]

    def record(self, key: str) -> Record | None:
        """None where nothing is known of these weights, or the file was damaged."""
        return self._records.get(key)

    def records(self) -> list[Record]:
        """All of them, of any training, by key."""
        return sorted(self._records.values(), key=lambda record: record.key)

    def keep(self, record: Record) -> None:
        self._records[record.key] = record
        self._write(self.folder(record.key) / "score.json", record.to_json())

    def results(self) -> dict[str, Any]:
        """results.json, or {} where there is none that can be read."""
        found = _json(self.results_path)
        return found if isinstance(found, dict) else {}

    def write(
        self, results: Mapping[str, Any], keys: Mapping[str, str], step: int, evaluation: EvaluationSettings
    ) -> None:
        """results.json, and grid.png with a labelled row of the first images of each of `keys` (name -> key)."""
        rows = {name: first_images(self.folder(key), evaluation.grid_images) for name, key in keys.items()}
        shown = {name: kept for name, kept in rows.items() if kept is not None}
        if shown:
            with as_user_error(self.grid_path, sum(kept.nbytes for kept in shown.values()), KEPT):
                save_grid(self.grid_path, shown, step, evaluation)
        self._write(self.results_path, json.dumps(results, indent=1, allow_nan=False))

    def made_with(self) -> list[dict[str, str]]:
        """Versions and devices that its images were sampled with, in the order in which they came."""
        return _json(self.path / "made_with.json") or []

    def keep_made_with(self, versions: Sequence[Mapping[str, str]]) -> None:
        self._write(self.path / "made_with.json", json.dumps(versions, indent=1))

    def is_empty(self) -> bool:
        """Whether no image was finished here."""
        return not any(self.path.glob("weights/*/features-*")) and not any(record.rows for record in self.records())

    def set_aside(self) -> Path:
        """Moves all content into a new folder beside this one, which is returned; the lock stays."""
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}-{number}")).exists():
            number += 1
        with as_user_error(aside, 0, KEPT):
            aside.mkdir()
            for path in [path for path in self.path.iterdir() if path.name != ".lock"]:
                os.replace(path, aside / path.name)
        self._records.clear()
        self._stores.clear()
        return aside

    def _write(self, path: Path, text: str) -> None:
        with as_user_error(path, len(text), KEPT):
            atomic_write(path, text)


def _json(path: Path) -> Any:
    """None where the file is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _read(path: Path) -> Record | None:
    try:
        return Record.from_json(path.read_text())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
