"""Run directory → Record. What is missing stays empty; a file that cannot be read is named.

A run directory may be a stranger's: nothing of it is run, and what lies outside it is not shown.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from PIL import Image
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open

from ddpm_ema.errors import UserError
from ddpm_ema.report.record import Record, Scoring, ranked
from ddpm_ema.report.schema import SCHEMA, Logged, Manifest, Results, Settings

STEP = re.compile(r"step-(\d{1,18})")
PNG = b"\x89PNG\r\n\x1a\n"
OBJECT: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Any])
T = TypeVar("T")


def read(path: Path) -> Record:
    """Reads a run directory; files that cannot be read are named in `problems`.

    Raises UserError if `path` is no run directory.
    """
    if not path.is_dir():
        raise UserError(
            f"{path}: no such folder; give the run directory that training wrote (output_dir in its settings)"
        )
    record = Record(path)
    _read_config(record)
    _read_manifest(record)
    _read_metrics(record)
    for file in sorted((path / "scores").glob("*/results.json")):
        _read_scoring(record, file)
    grids = [(match, grid) for grid in (path / "samples").glob("*.png") if (match := STEP.fullmatch(grid.stem))]
    record.sample_grids = sorted((int(match[1]), grid) for match, grid in grids)
    if not (record.config_text or record.manifest.step or record.training or record.scorings or record.problems):
        raise UserError(
            f"{path}: holds no config.yaml, metrics.jsonl, checkpoint or scores, so it is no run directory; "
            "give the folder that training wrote (output_dir in its settings)"
        )
    return record


def picture(record: Record, path: Path) -> tuple[bytes, str] | None:
    """A PNG of the run directory and the title that it holds; None, with the reason in `problems`, for anything else."""
    return _parsed(record, path, _png, embedded=True)


def _png(data: bytes) -> tuple[bytes, str]:
    if not data.startswith(PNG):
        raise ValueError("it is no PNG")
    with Image.open(io.BytesIO(data), formats=["PNG"]) as opened:
        return data, str(opened.info.get("Title", ""))


def _parsed(record: Record, path: Path, parse: Callable[[bytes], T], embedded: bool = False) -> T | None:
    """`parse(content)`, or None with the reason in `problems`. The text or the bytes of an `embedded` file stand on the
    page as they are, so it must be one of the run directory itself, or the page would carry other files away."""
    try:
        if embedded and not path.resolve().is_relative_to(record.path.resolve()):
            raise ValueError("it lies outside the run directory")
        if not path.is_file():
            raise ValueError("it is no regular file")  # a named pipe would be waited for
        return parse(path.read_bytes())
    except ValidationError as error:
        reason = f"it is malformed: {_first(error)}"
    except OSError as error:
        reason = f"it could not be read: {error.strerror or error}"
    except (ValueError, TypeError, RuntimeError, SyntaxError, yaml.YAMLError) as error:  # YAML's dates, keys, nesting
        reason = " ".join(str(error).split())[:200]
    record.problems.append(f"{path.relative_to(record.path)} was passed over: {reason}")
    return None


def _first(error: ValidationError) -> str:
    """`rows.0.weights: Input should be a valid string`, of the first of its errors."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where[:80]}: {first['msg']}" if where else str(first["msg"])


def _read_config(record: Record) -> None:
    file = record.path / "config.yaml"
    if not (file.exists() or file.is_symlink()):
        return

    def parse(data: bytes) -> tuple[str, Settings]:
        text = data.decode()
        settings = yaml.safe_load(text)
        if not isinstance(settings, dict):
            raise ValueError("it is no mapping of settings")
        return text, Settings.model_validate(settings)

    record.config_text, record.settings = _parsed(record, file, parse, embedded=True) or ("", Settings())


def _read_manifest(record: Record) -> None:
    """The manifest of the newest checkpoint whose manifest is whole, by step."""
    folders = [(int(match[1]), p) for p in (record.path / "checkpoints").glob("*") if (match := STEP.fullmatch(p.name))]
    for _, folder in sorted(folders, reverse=True):
        manifest = _parsed(record, folder / "manifest.json", Manifest.model_validate_json)
        if manifest is not None:
            record.manifest = manifest
            record.num_parameters = _num_parameters(folder / "raw.safetensors")
            if not record.config_text:
                record.settings = manifest.settings
            return


def _num_parameters(file: Path) -> int | None:
    """Parameters of the network, from the shapes in the header of its weights."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="np") as opened:
            return sum(math.prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118
    except (OSError, SafetensorError):
        return None


def _read_metrics(record: Record) -> None:
    """Training rows by step, a later row of the same step replacing an earlier one, and the quick scorings."""
    file = record.path / "metrics.jsonl"
    content = _parsed(record, file, bytes) if file.exists() else b""
    rows, bad = [], []
    *lines, last = (content or b"").split(b"\n")
    for place, line in enumerate([*lines, last], start=1):
        try:
            if line.strip():
                rows.append(Logged.model_validate_json(line))
        except ValidationError as error:
            bad += [f"line {place}: {_first(error)}"] if place <= len(lines) else []  # a kill cut the last one short
    if bad:
        record.problems.append(f"{file.name}: {len(bad)} malformed lines were passed over, such as {bad[0]}")
    training = {row.step: row for row in rows if row.scores is None}
    quick = {row.step: found for row in rows if row.scores is not None and (found := ranked(row.scores))}
    record.training = [training[step] for step in sorted(training)]
    record.quick = sorted(quick.items())


def _read_scoring(record: Record, file: Path) -> None:
    results = _parsed(record, file, _results)
    if results is not None:
        grid = file.parent / "grid.png"
        finished = results.finished.timestamp() if results.finished is not None else file.stat().st_mtime
        record.scorings.append(Scoring(file.parent.name, results, finished, grid if grid.exists() else None))


def _results(data: bytes) -> Results:
    if (schema := OBJECT.validate_json(data).get("schema")) != SCHEMA:
        raise ValueError(f"it is of schema {str(schema)[:20]}, and this version reads {SCHEMA}")
    return Results.model_validate_json(data)
