"""A run directory read for people: whatever is there, as plain data. No torch, nothing assumed to be complete."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from ddpm_ema.errors import UserError
from ddpm_ema.numbers import metric_label

SCHEMA = 2
STEP = re.compile(r"step-(\d+)")
PROTOCOL = (
    "metric",
    "extractor",
    "extractor_sha256",
    "reference",
    "num_images",
    "sampler",
    "num_inference_steps",
    "seed",
)
SCORE_FOLDER = re.compile(r"(\d+)-(.+)")


@dataclass(frozen=True)
class Interval:
    """A difference with its standard error and 95% interval, in units of the distance."""

    delta: float
    stderr: float
    low: float
    high: float

    @property
    def significant(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0

    def reversed(self) -> Interval:
        """b - a, given a - b."""
        return Interval(-self.delta, self.stderr, -self.high, -self.low)


@dataclass(frozen=True)
class Row:
    """One scored copy. Figures that a scoring did not compute are None."""

    weights: str
    distance: float
    unbiased: float | None
    stderr: float | None
    versus_raw: Interval | None
    source: Mapping[str, Any] = field(repr=False)

    def get(self, key: str) -> float | None:
        """Any further figure of the row (kid, precision, recall, seconds, std ...), or None."""
        return number(self.source.get(key))

    @property
    def name(self) -> str:
        """The copy without its step: `ema_0_999` of `ema_0_999@1500`."""
        return self.weights.partition("@")[0]

    @property
    def ranked_by(self) -> float:
        """The bias-corrected distance; the plain one where there is no other. Lower is better."""
        return self.distance if self.unbiased is None else self.unbiased


@dataclass(frozen=True)
class Scoring:
    """One results.json, rows from the best to the worst."""

    path: Path
    step: int
    digest: str
    source: Mapping[str, Any] = field(repr=False)
    rows: tuple[Row, ...]
    grid: Path | None

    @property
    def protocol(self) -> str:
        """What must agree before two scorings may stand on one curve: every setting that changes the numbers."""
        return json.dumps([self.source.get(key) for key in ("settings_digest", *PROTOCOL)])

    @property
    def sweep(self) -> tuple[Row, ...]:
        """Reconstructed averages that were scored beside the copies, from the best to the worst."""
        return read_rows(self.source.get("sweep"))

    @property
    def metric(self) -> str:
        """`FID`, only where the scoring says so; anything else names its extractor."""
        return metric_label(self.source)

    @property
    def raw(self) -> Row | None:
        return next((row for row in self.rows if row.weights == "raw"), None)

    @cached_property
    def pairs(self) -> dict[tuple[str, str], Interval]:
        """(a, b) -> paired difference a - b."""
        found: dict[tuple[str, str], Interval] = {}
        for entry in self.source.get("pairs") or ():
            interval = read_interval(entry, "delta", "stderr", "interval")
            if interval is not None and "a" in entry and "b" in entry:
                found[entry["a"], entry["b"]] = interval
                found[entry["b"], entry["a"]] = interval.reversed()
        for row in self.rows:
            if row.versus_raw is not None:
                found[row.weights, "raw"] = row.versus_raw
                found["raw", row.weights] = row.versus_raw.reversed()
        return found


@dataclass
class Record:
    """Everything that a run directory says about its run."""

    path: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    config_text: str = ""
    manifest: Mapping[str, Any] = field(default_factory=dict)
    training: list[Mapping[str, Any]] = field(default_factory=list)
    quick: list[tuple[int, tuple[Row, ...]]] = field(default_factory=list)
    scorings: list[Scoring] = field(default_factory=list)
    sample_grids: list[tuple[int, Path]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def main(self) -> Scoring | None:
        """The scoring that answers: of the last step scored, the one of most images."""
        full = [scoring for scoring in self.scorings if scoring.rows]
        return max(full, key=lambda s: (s.step, number(s.source.get("num_images")) or 0, len(s.rows)), default=None)

    @property
    def copies(self) -> list[str]:
        """Names of the copies, raw first, then as the settings list them, then what else was scored."""
        kept = [*(self.settings.get("averages") or {}), *(self.manifest.get("profiles") or {})]
        scored = [row.name for scoring in self.scorings for row in scoring.rows]
        return list(dict.fromkeys(["raw", *kept, *scored]))

    @cached_property
    def num_parameters(self) -> int | None:
        """Parameters of the network, from the shapes in the newest checkpoint's raw weights; None without them."""
        step = number(self.manifest.get("step"))
        if step is None:
            return None
        try:
            with safe_open(
                self.path / "checkpoints" / f"step-{int(step):08d}" / "raw.safetensors", framework="np"
            ) as file:
                return sum(int(math.prod(file.get_slice(name).get_shape())) for name in file.keys())  # noqa: SIM118
        except (OSError, SafetensorError):
            return None

    @property
    def last_step(self) -> int | None:
        """The last step that metrics, a checkpoint or a scoring tell of."""
        steps = [
            self.manifest.get("step"),
            *(row["step"] for row in self.training[-1:]),
            *(s.step for s in self.scorings),
        ]
        return max((int(step) for step in steps if step is not None), default=None)


def number(value: Any) -> float | None:
    """A finite float, or None for anything else (JSON written by Python may hold NaN)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def read_interval(entry: Mapping[str, Any], delta: str, stderr: str, interval: str) -> Interval | None:
    """The three fields of a difference, or None unless all are there and finite."""
    ends = entry.get(interval)
    bounds = [number(end) for end in ends] if isinstance(ends, list) and len(ends) == 2 else [None, None]
    values = [number(entry.get(delta)), number(entry.get(stderr)), *bounds]
    if any(value is None for value in values):
        return None
    return Interval(*(value for value in values if value is not None))


def read_row(source: Mapping[str, Any]) -> Row | None:
    """A row of results.json, or None if it names no copy or has no distance."""
    distance, weights = number(source.get("frechet_distance")), source.get("weights")
    if distance is None or not isinstance(weights, str):
        return None
    return Row(
        weights=weights,
        distance=distance,
        unbiased=number(source.get("frechet_distance_unbiased")),
        stderr=number(source.get("stderr")),
        versus_raw=read_interval(source, "delta_vs_raw", "delta_stderr", "interval") if weights != "raw" else None,
        source=source,
    )


def read_rows(sources: Any) -> tuple[Row, ...]:
    """Rows from the best to the worst; rows without a distance are left out."""
    entries = [entry for entry in sources or () if isinstance(entry, Mapping)]
    return tuple(sorted((row for row in map(read_row, entries) if row is not None), key=lambda row: row.ranked_by))


def read(path: Path) -> Record:
    """Reads a run directory.

    What is missing stays empty; a file that cannot be read is named in `problems`. Raises UserError if `path` is no run directory.
    """
    if not path.is_dir():
        raise UserError(
            f"{path}: no such folder; give the run directory that training wrote (output_dir in its settings)"
        )
    record = Record(path)
    _read_config(record)
    _read_manifest(record)
    _read_metrics(record)
    for results in sorted((path / "scores").glob("*/results.json")):
        _read_scoring(record, results)
    grids = [(match, grid) for grid in (path / "samples").glob("*.png") if (match := STEP.fullmatch(grid.stem))]
    record.sample_grids = sorted((int(match[1]), grid) for match, grid in grids)
    if not (record.settings or record.manifest or record.training or record.scorings):
        raise UserError(
            f"{path}: holds no config.yaml, metrics.jsonl, checkpoint or scores, so it is no run directory; "
            "give the folder that training wrote (output_dir in its settings)"
        )
    return record


def _read_config(record: Record) -> None:
    file = record.path / "config.yaml"
    try:
        record.config_text = file.read_text(encoding="utf-8")
        settings = yaml.safe_load(record.config_text)
    except FileNotFoundError:
        return
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        record.problems.append(f"{file.name} could not be read: {' '.join(str(error).split())}")
        return
    record.settings = settings if isinstance(settings, Mapping) else {}


def _read_manifest(record: Record) -> None:
    """The manifest of the newest checkpoint whose manifest is whole, by step."""
    folders = [(int(match[1]), p) for p in (record.path / "checkpoints").glob("*") if (match := STEP.fullmatch(p.name))]
    for _, folder in sorted(folders, reverse=True):
        manifest = _json(record, folder / "manifest.json")
        if manifest:
            record.manifest = manifest
            record.settings = record.settings or manifest.get("settings") or {}
            return


def _read_metrics(record: Record) -> None:
    """Training rows by step, a later row of the same step replacing an earlier one, and the quick scorings."""
    training: dict[int, Mapping[str, Any]] = {}
    quick: dict[int, tuple[Row, ...]] = {}
    for row in _json_lines(record.path / "metrics.jsonl"):
        step = number(row.get("step"))
        if step is None:
            continue
        if "scores" in row:
            quick[int(step)] = read_rows(row["scores"])
        else:
            training[int(step)] = row
    record.training = [training[step] for step in sorted(training)]
    record.quick = [(step, quick[step]) for step in sorted(quick) if quick[step]]


def _json_lines(path: Path) -> Iterator[Mapping[str, Any]]:
    """Rows of a file that a kill may have cut short in its last line."""
    if not path.is_file():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, Mapping):
                yield row


def _read_scoring(record: Record, file: Path) -> None:
    source = _json(record, file)
    if not source:
        return
    match = SCORE_FOLDER.fullmatch(file.parent.name)
    step = number(source.get("step")) if number(source.get("step")) is not None else match and int(match[1])
    if source.get("schema") != SCHEMA or step is None:
        where = file.relative_to(record.path)
        record.problems.append(f"{where} was passed over: schema {source.get('schema')!r}, this version reads {SCHEMA}")
        return
    grid = file.parent / "grid.png"
    digest = match[2] if match else file.parent.name
    rows = read_rows(source.get("rows"))
    record.scorings.append(Scoring(file, int(step), digest, source, rows, grid if grid.is_file() else None))


def _json(record: Record, file: Path) -> Mapping[str, Any]:
    """A JSON object, or {} with the reason in `problems`."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or f"not JSON ({error})"
        record.problems.append(f"{file.relative_to(record.path)} could not be read: {reason}")
        return {}
    return value if isinstance(value, Mapping) else {}
