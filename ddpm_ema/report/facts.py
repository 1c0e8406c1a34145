"""What was trained, on what, for how long, and how a scoring was made: words and their values for the page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ddpm_ema.report.record import Record, Scoring, plain

Facts = list[tuple[str, str]]
# Settings of a scoring, beside those that `made` words itself.
OPTIONAL = {
    "clip_sample": "Clipping of x_0",
    "mixed_precision": "Precision of the network",
    "groups": "Jackknife groups",
    "settings_digest": "Digest of the settings",
}


def run(record: Record) -> Facts:
    """What was trained, on what, how long, of what is known."""
    return [(word, text) for word, text in _run(record) if text]


def _run(record: Record) -> Iterator[tuple[str, str]]:
    settings, manifest = record.settings, record.manifest
    if name := manifest.data_name or settings.data_name or settings.data_source:
        size = f", {manifest.data_size:,} images" if manifest.data_size else ""
        colours = {1: " grey", 3: " RGB"}.get(settings.channels or 0, "")
        shape = f", {settings.image_size}\u00d7{settings.image_size}{colours}" if settings.image_size else ""
        yield "Data", f"{name}{size}{shape}"
    parameters, channels = record.num_parameters, settings.block_out_channels
    size = f"U-Net of {_si(parameters)} parameters" if parameters else "U-Net" if channels else ""
    yield "Network", size + ("; channels " + ", ".join(map(str, channels)) if channels else "")
    done, planned, batch = record.last_step, settings.training_steps, settings.batch_size
    steps = "none yet" if done is None else f"{done:,}"
    steps += f" of {planned:,}" if planned and done != planned else ""
    yield "Steps", steps + (f", {batch} images per step" if batch and done else "")
    if seconds := sum(row.get("seconds") or 0.0 for row in record.training):
        yield "Time", duration(seconds) + _speed(record)
    yield "Weights", "; ".join(_rule(name, record.profiles.get(name, {})) for name in record.names)


def _rule(name: str, rule: dict[str, Any]) -> str:
    """`power_0_10 (power_function, std 0.1)`. Scalars only: a stranger's YAML may unfold to gigabytes."""
    fields = {key: value for key, value in rule.items() if isinstance(value, (str, int, float))}
    if (kind := fields.pop("kind", None)) is None:
        return name
    return f"{name} ({', '.join([str(kind), *(f'{key} {plain(value)}' for key, value in fields.items())])})"


def _speed(record: Record) -> str:
    speeds = sorted(speed for row in record.training if (speed := row.get("images_per_second")) is not None)
    text = f", {speeds[len(speeds) // 2]:,.0f} images/s" if speeds else ""
    processes = record.manifest.world_size
    return text + (f" on {processes} processes" if processes > 1 else "")


def made(scoring: Scoring) -> Facts:
    """The protocol of a scoring."""
    settings = scoring.settings
    meaning = "Fr\u00e9chet Inception distance, comparable with published figures of the same protocol"
    if scoring.metric != "fid":
        meaning = (
            "Fr\u00e9chet distance in the features of this extractor: not an FID, not comparable with published FIDs"
        )
    sha256 = f", sha256 {scoring.extractor_sha256}" if scoring.extractor_sha256 else ""
    found = [
        ("Distance", meaning),
        ("Extractor", f"{scoring.extractor}{sha256}"),
        ("Reference", scoring.reference),
        ("Images", f"{scoring.num_images:,} per average"),
        ("Sampler", f"{scoring.sampling}; a step is one network evaluation per image"),
        *((title, settings[key]) for key, title in OPTIONAL.items() if settings.get(key, "none") != "none"),
        ("Seed", f"{scoring.seed}; image i has the same noise for all weights"),
        ("Scored step", f"{scoring.step:,}"),
    ]
    seconds = sum(row.seconds or 0.0 for row in scoring.rows)
    return [*found, ("Time", duration(seconds))] if seconds else found


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
