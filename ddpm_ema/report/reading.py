"""Run directory → Record. What is missing stays empty; a file that cannot be read is named in `problems`.

A run directory may be a stranger's: nothing in it is run, and no file outside it is shown.
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
from ddpm_ema.report.record import SCHEMA, Logged, Manifest, Record, Scoring, Settings
from ddpm_ema.rundir.layout import weights_file

STEP = re.compile(r"step-(\d{1,18})")
PNG = b"\x89PNG\r\n\x1a\n"
MAX_PIXELS = 64 * 2**20
OBJECT: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Any])
ADVICE = "give the run directory that training wrote (output_dir in its settings)"
T = TypeVar("T")


def read(path: Path) -> Record:
    """Reads a run directory; files that cannot be read are named in `problems`.

    Raises UserError if `path` is no run directory.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; {ADVICE}")
    record = Record(path)
    _read_config(record)
    _read_manifest(record)
    _read_metrics(record)
    read_scorings(record)
    record.sample_grids = _by_step(path / "samples", "*.png")
    if not (record.config_text or record.manifest.step or record.training or record.scorings or record.problems):
        raise UserError(f"{path}: is no run directory (no config.yaml, metrics.jsonl, checkpoint or scores); {ADVICE}")
    return record


def read_scorings(record: Record) -> None:
    for file in sorted((record.path / "scores").glob("*/results.json")):
        if (scoring := _parsed(record, file, _results)) is not None:
            grid = file.with_name("grid.png")
            found = {"folder": file.parent.name, "grid": grid if grid.exists() else None}
            record.scorings.append(scoring.model_copy(update=found))


def _by_step(folder: Path, pattern: str) -> list[tuple[int, Path]]:
    """What is called `step-N` in a folder, by step."""
    paths = [(STEP.fullmatch(path.name.removesuffix(".png")), path) for path in folder.glob(pattern)]
    return sorted((int(match[1]), path) for match, path in paths if match)


def picture(record: Record, path: Path) -> Image.Image | None:
    """A decoded PNG of the run directory; None, with the reason in `problems`, for anything else."""
    return _parsed(record, path, _png, embedded=True)


def _png(data: bytes) -> Image.Image:
    if not data.startswith(PNG):
        raise ValueError("it is not a PNG file")
    with Image.open(io.BytesIO(data), formats=["PNG"]) as opened:
        if opened.width * opened.height > MAX_PIXELS:
            raise ValueError(f"it has {opened.width} x {opened.height} pixels")
        opened.load()
        return opened


def _parsed(record: Record, path: Path, parse: Callable[[bytes], T], embedded: bool = False) -> T | None:
    """`parse(content)`, or None with the reason in `problems`.

    The page shows the content of an `embedded` file, which must therefore lie in the run directory itself: a link would let
    the page carry other files away.
    """
    try:
        if embedded and not path.resolve().is_relative_to(record.path.resolve()):
            raise ValueError("it lies outside the run directory")
        if not path.is_file():
            raise ValueError("it is not a regular file")  # reading a named pipe would wait
        return parse(path.read_bytes())
    except ValidationError as error:
        reason = f"it is malformed: {_first(error)}"
    except OSError as error:
        reason = f"it could not be read: {error.strerror or error}"
    except (ValueError, TypeError, RuntimeError, SyntaxError, yaml.YAMLError) as error:  # YAML's dates, keys, nesting
        reason = " ".join(str(error).split())[:200]
    record.problems.append(f"{path.relative_to(record.path)} was skipped: {reason}")
    return None


def _first(error: ValidationError) -> str:
    """`rows.0.weights: Input should be a valid string`, of the first of its errors."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(map(str, first["loc"]))[:80]
    return f"{where}: {first['msg']}" if where else str(first["msg"])


def _read_config(record: Record) -> None:
    def parse(data: bytes) -> tuple[str, Settings]:
        settings = yaml.safe_load(text := data.decode())
        if not isinstance(settings, dict):
            raise ValueError("it is not a mapping of settings")
        return text, Settings.model_validate(settings)

    file = record.path / "config.yaml"
    if file.exists() or file.is_symlink():
        record.config_text, record.settings = _parsed(record, file, parse, embedded=True) or ("", Settings())


def _read_manifest(record: Record) -> None:
    """The manifest of the newest checkpoint whose manifest is whole, by step."""
    for _, folder in reversed(_by_step(record.path / "checkpoints", "*")):
        manifest = _parsed(record, folder / "manifest.json", Manifest.model_validate_json)
        if manifest is not None:
            record.manifest = manifest
            record.num_parameters = _num_parameters(folder / weights_file("raw"))
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
    """Training rows and quick scorings by step; a later row of the same step replaces an earlier one."""
    file = record.path / "metrics.jsonl"
    lines = ((_parsed(record, file, bytes) if file.exists() else b"") or b"").split(b"\n")
    training: dict[int, Logged] = {}
    quick: dict[int, Logged] = {}
    bad = []
    for place, line in enumerate(lines, start=1):
        try:
            if line.strip():
                row = Logged.model_validate_json(line)
                (training if row.scores is None else quick)[row.step] = row
        except ValidationError as error:
            bad += [f"line {place}: {_first(error)}"] if place < len(lines) else []  # a kill may cut the last one short
    if bad:
        record.problems.append(f"{file.name}: {len(bad)} malformed lines were skipped, such as {bad[0]}")
    record.training = [training[step] for step in sorted(training)]
    record.quick = [quick[step] for step in sorted(quick) if quick[step].scores]


def _results(data: bytes) -> Scoring:
    if (schema := OBJECT.validate_json(data).get("schema")) != SCHEMA:
        raise ValueError(f"it has schema {str(schema)[:20]}, and this version reads {SCHEMA}")
    return Scoring.model_validate_json(data)
