"""The record of a run → one self-contained HTML page: what it says, section by section, and the template filled in."""

from __future__ import annotations

import base64
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from ddpm_ema import numbers
from ddpm_ema.report import figures, verdict
from ddpm_ema.report.drawing import Drawing, Look, looks, style
from ddpm_ema.report.record import Record, Scoring, number

TEMPLATES = Path(__file__).parents[1] / "templates"
MAX_IMAGE_BYTES = 24 * 2**20  # a page of more than this no longer opens well on a phone


@dataclass(frozen=True)
class Picture:
    """An image of the page, inside the page."""

    uri: str
    title: str
    alt: str


def render(record: Record) -> str:
    """The page as HTML. Every value is escaped by the template."""
    look = looks(record.copies)
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    environment.filters["names"] = _name_marker(record)
    environment.globals.update(figure=numbers.figure, with_error=numbers.with_error, reality=verdict.reality)
    with style():
        content = _content(record, look)
    return environment.get_template("report.html").render(record=record, looks=look, **content)


def _content(record: Record, look: Mapping[str, Look]) -> dict[str, Any]:
    scoring = record.main
    return {
        "title": record.path.resolve().name,
        "facts": facts(record),
        "answer": verdict.judge(scoring) if scoring else None,
        "scoring": scoring,
        "columns": _columns(scoring) if scoring else [],
        "differences": figures.differences(scoring, look) if scoring else None,
        "profiles": figures.profiles(record.manifest.get("weightings") or {}, look),
        "over_steps": _over_steps(record, scoring, look),
        "sweep": _sweep(record, scoring),
        "pictures": _pictures(record, scoring),
        "curves": _curves(record, look),
        "made": _how_made(record, scoring),
        "others": [other for other in record.scorings if other is not scoring],
        "warnings": warnings(record, scoring),
        "commands": _commands(record),
        "export": _export_command(record, scoring),
        "versions": record.manifest.get("versions") or {},
    }


def facts(record: Record) -> list[tuple[str, str]]:
    """What was trained, on what, how long: pairs of a word and its value, of what is known."""
    settings, manifest = record.settings, record.manifest
    data, training = settings.get("data") or {}, settings.get("training") or {}
    dataset = manifest.get("dataset") or {}
    found: list[tuple[str, str]] = []
    name = dataset.get("name") or data.get("name") or data.get("source")
    if name:
        size = number(dataset.get("size"))
        pixels, channels = data.get("image_size"), {1: "grey", 3: "RGB"}.get(data.get("channels", 0), "")
        shape = f", {pixels}\u00d7{pixels} {channels}".rstrip() if pixels else ""
        found.append(("Images", f"{name}{f', {size:,.0f} of them' if size else ''}{shape}"))
    network = _network(record)
    if network:
        found.append(("Network", network))
    found.append(("Steps", _steps(record, training)))
    seconds = sum(number(row.get("seconds")) or 0.0 for row in record.training)
    if seconds:
        found.append(("Time", duration(seconds) + _speed(record)))
    found.append(("Copies", "; ".join(_copy(record, name) for name in record.copies)))
    return found


def _copy(record: Record, name: str) -> str:
    """`power_0_10 (power_function, std 0.1)`: a copy and the rule it is averaged by, where that is known."""
    profiles = {**(record.settings.get("averages") or {}), **(record.manifest.get("profiles") or {})}
    rule = profiles.get(name)
    if not isinstance(rule, Mapping):
        return name
    fields = [f"{key} {_number(value)}" for key, value in rule.items() if key != "kind"]
    return f"{name} ({', '.join([str(rule.get('kind', '?')), *fields])})"


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _network(record: Record) -> str:
    parameters = record.num_parameters
    channels = (record.settings.get("model") or {}).get("block_out_channels")
    parts = [f"U-Net of {_si(parameters)} parameters" if parameters else "U-Net" if channels else ""]
    if channels:
        parts.append("channels " + ", ".join(str(c) for c in channels))
    return "; ".join(part for part in parts if part)


def _steps(record: Record, training: Mapping[str, Any]) -> str:
    done, planned = record.last_step, training.get("steps")
    if done is None:
        return "none yet" + (f" of {planned:,}" if planned else "")
    text = f"{done:,}" if not planned or done == planned else f"{done:,} of {planned:,}"
    batch = training.get("batch_size")
    return f"{text}, {batch} images each" if batch else text


def _speed(record: Record) -> str:
    speeds = sorted(s for row in record.training if (s := number(row.get("images_per_second"))) is not None)
    processes = record.manifest.get("world_size")
    text = f", {speeds[len(speeds) // 2]:,.0f} images/s" if speeds else ""
    return text + (f" on {processes} processes" if isinstance(processes, int) and processes > 1 else "")


def duration(seconds: float) -> str:
    """`2 min 35 s`, `3 h 20 min`."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


def _si(value: float) -> str:
    for unit, size in (("billion", 1e9), ("million", 1e6), ("thousand", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


@dataclass(frozen=True)
class Column:
    """A further column of the table of copies."""

    key: str
    title: str
    places: int


FURTHER = (
    Column("kid", "KID", 4),
    Column("inception_score", "IS", 2),
    Column("precision", "Precision", 3),
    Column("recall", "Recall", 3),
)


def _columns(scoring: Scoring) -> list[Column]:
    """Columns that at least one row fills."""
    return [column for column in FURTHER if any(row.get(column.key) is not None for row in scoring.rows)]


def _over_steps(record: Record, scoring: Scoring | None, look: Mapping[str, Look]) -> list[Drawing]:
    found: list[Drawing | None] = []
    if scoring is not None:
        comparable = sorted((s for s in record.scorings if s.protocol == scoring.protocol), key=lambda s: s.step)
        found.append(figures.over_steps([(s.step, s.rows) for s in comparable], scoring.metric, look, "over-steps"))
    if record.quick:
        label = _quick_label(record)
        found.append(figures.over_steps(record.quick, label, look, "quick"))
    return [drawing for drawing in found if drawing is not None]


def _quick_label(record: Record) -> str:
    images = (record.settings.get("evaluation") or {}).get("every_num_images")
    metric = record.quick[-1][1][0].source.get("metric")
    name = "FID" if metric == "fid" else "FD"
    return f"{name} while training ({images:,} images)" if isinstance(images, int) else f"{name} while training"


@dataclass(frozen=True)
class Sweep:
    """The plots of the newest scoring that has a sweep, and what its rows warn of."""

    drawings: tuple[Drawing, ...] = ()
    warnings: tuple[str, ...] = ()


def _sweep(record: Record, scoring: Scoring | None) -> Sweep:
    sources = [scoring] if scoring else []
    sources += sorted((s for s in record.scorings if s is not scoring), key=lambda s: -s.step)
    for source in sources:
        rows, best = source.sweep, source.source.get("sweep_best") or {}
        drawings = [
            drawing
            for key in ("std", "decay")
            for drawing in figures.sweep(
                rows, key, source.metric, _SWEEP_LOOK, (best.get(key) or {}).get("not_significantly_worse", ())
            )
        ]
        if drawings:
            texts = [f"{row.weights}: {text}" for row in rows for text in _listed_warnings(row.source)]
            return Sweep(tuple(drawings), tuple(texts))
    return Sweep()


_SWEEP_LOOK = looks(["sweep"])["sweep"]


def _pictures(record: Record, scoring: Scoring | None) -> list[Picture]:
    """The scoring's grid, then the first, middle and last grid of training, as far as the page's size allows."""
    wanted: list[tuple[Path, str]] = []
    if scoring is not None and scoring.grid is not None:
        wanted.append((scoring.grid, f"Scored at step {scoring.step:,}"))
    grids = record.sample_grids
    chosen = {0, len(grids) // 2, len(grids) - 1} if grids else set()
    wanted += [(grids[i][1], f"While training, step {grids[i][0]:,}") for i in sorted(chosen, reverse=True)]
    found, size = [], 0
    for path, title in wanted:
        try:
            data = path.read_bytes()
        except OSError as error:
            record.problems.append(f"{path.relative_to(record.path)} could not be read: {error.strerror}")
            continue
        size += len(data)
        if size > MAX_IMAGE_BYTES:
            record.problems.append(f"{path.relative_to(record.path)} was left out of this page: it would be too large")
            continue
        uri = "data:image/png;base64," + base64.b64encode(data).decode()
        found.append(
            Picture(uri, title, f"{title}: one labelled row of samples for each copy, same noise in every row")
        )
    return found


def _curves(record: Record, look: Mapping[str, Look]) -> list[Drawing]:
    rows = record.training
    schedule = (record.settings.get("diffusion") or {}).get("num_train_timesteps", 1000)
    skipped = [number(row.get("skipped_steps")) or 0.0 for row in rows]
    found = [
        figures.curve(rows, "loss", "Training loss", "loss", "Mean over the steps since the row before."),
        figures.quarters(rows, schedule),
        figures.distances(rows, look),
        figures.curve(rows, "grad_norm", "Gradient norm", "global norm", "Before clipping."),
        figures.curve(rows, "learning_rate", "Learning rate", "learning rate", "", linear=True),
        figures.curve(rows, "images_per_second", "Speed", "images/s", "Over all processes.", linear=True),
    ]
    if any(skipped):
        caption = "Steps that mixed precision skipped because a gradient overflowed; no average moved on them."
        found.append(figures.curve(rows, "skipped_steps", "Skipped steps", "steps", caption))
    return [drawing for drawing in found if drawing is not None]


def _how_made(record: Record, scoring: Scoring | None) -> list[tuple[str, str]]:
    """The protocol of the scoring, a word and its value each."""
    if scoring is None:
        return []
    source = scoring.source
    sampler = f"{source.get('sampler', '?')}, {source.get('num_inference_steps', '?')} network evaluations an image"
    sha = source.get("extractor_sha256")
    found = [
        ("Distance", _distance_meaning(source)),
        ("Extractor", f"{source.get('extractor', '?')}{f', sha256 {sha}' if sha else ''}"),
        ("Reference", _text(source.get("reference"))),
        ("Images a copy", _text(source.get("num_images"))),
        ("Sampler", sampler),
        *((title, _text(source[key])) for key, title in _OPTIONAL.items() if source.get(key) is not None),
        ("Seed", f"{_text(source.get('seed'))}; image i has the same noise for every copy"),
        ("Scored step", f"{scoring.step:,}"),
    ]
    seconds = sum(row.get("seconds") or 0.0 for row in scoring.rows)
    return [*found, ("Time", duration(seconds))] if seconds else found


_OPTIONAL = {
    "eta": "DDIM's eta",
    "guidance_scale": "Guidance scale",
    "clip_sample": "Clipping of x_0",
    "mixed_precision": "Precision of the network",
    "groups": "Jackknife groups",
    "settings_digest": "Digest of the settings",
}


def _distance_meaning(source: Mapping[str, Any]) -> str:
    if source.get("metric") == "fid":
        return "Fr\u00e9chet Inception distance, comparable with published figures of the same protocol"
    return "Fr\u00e9chet distance in the features of the extractor below: no FID, not comparable with published FIDs"


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(entry)}" for key, entry in value.items())
    return str(value)


def warnings(record: Record, scoring: Scoring | None) -> list[str]:
    """What a reader must know before trusting the page: of files, of the scoring, of single copies, of how they belong together."""
    found = list(record.problems)
    if scoring is not None:
        found += _listed_warnings(scoring.source)
        for row in scoring.rows:
            found += [f"{row.weights}: {text}" for text in _listed_warnings(row.source)]
        if record.last_step is not None and scoring.step < record.last_step:
            found.append(
                f"Training has gone on to step {record.last_step:,} since step {scoring.step:,} was scored: "
                "what is said here is of the earlier step."
            )
    return list(dict.fromkeys(found))


def _listed_warnings(source: Mapping[str, Any]) -> list[str]:
    texts = source.get("warnings")
    return [text for text in texts if isinstance(text, str)] if isinstance(texts, list) else []


def _commands(record: Record) -> dict[str, str]:
    """The command lines that make what is missing."""
    config = shlex.quote(str(record.path / "config.yaml"))
    folder = shlex.quote(str(record.path))
    return {
        "train": f"accelerate launch scripts/train.py --config {config}",
        "score": f"accelerate launch scripts/sample_and_score.py --config {config}",
        "sweep": f"accelerate launch scripts/sample_and_score.py --config {config} --evaluation.sweep.stds 0.02:0.25:12",
        "steps": f"accelerate launch scripts/sample_and_score.py --config {config} --evaluation.steps all",
        "report": f"python scripts/report.py {folder}",
    }


def _export_command(record: Record, scoring: Scoring | None) -> str | None:
    """How to export the best copy; None for one that is no single copy of this run (an ensemble, another's folder)."""
    best = verdict.judge(scoring).best if scoring else None
    if scoring is None or best is None or not re.fullmatch(r"[\w-]+(@\d+)?", best):
        return None
    name = best if "@" in best else f"{best}@{scoring.step}"
    return f"python scripts/export.py {shlex.quote(str(record.path))} {name} --output FOLDER"


def _name_marker(record: Record) -> Any:
    """A filter that sets the names of copies in a sentence in code type; everything is escaped first."""
    scored: Iterable[str] = (row.weights for scoring in record.scorings for row in scoring.rows)
    names = sorted({*record.copies, *scored}, key=len, reverse=True)
    pattern = re.compile(r"(?<![\w@-])(" + "|".join(re.escape(str(escape(name))) for name in names) + r")(?![\w@-])")

    def mark(text: str) -> Markup:
        return Markup(pattern.sub(r"<code>\1</code>", str(escape(text))))

    return mark
