"""What was trained, on what, for how long, and how a scoring was made: words and their values for the page."""

from __future__ import annotations

from collections.abc import Iterator

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
    data, dataset = record.settings.data, record.manifest.dataset
    name = dataset.name or data.name or data.source
    if name:
        size = f", {dataset.size:,} of them" if dataset.size else ""
        colours = {1: " grey", 3: " RGB"}.get(data.channels or 0, "")
        shape = f", {data.image_size}\u00d7{data.image_size}{colours}" if data.image_size else ""
        yield "Images", f"{name}{size}{shape}"
    yield "Network", _network(record)
    yield "Steps", _steps(record)
    if seconds := sum(row.get("seconds") or 0.0 for row in record.training):
        yield "Time", duration(seconds) + _speed(record)
    yield "Weights", "; ".join(_rule(record, name) for name in record.names)


def _rule(record: Record, name: str) -> str:
    """`power_0_10 (power_function, std 0.1)`: the weights and the rule they are averaged by, where that is known."""
    rule = record.profiles.get(name, {})
    fields = [f"{key} {plain(value)}" for key, value in rule.items() if key != "kind" and _scalar(value)]
    return f"{name} ({', '.join([str(rule['kind']), *fields])})" if _scalar(rule.get("kind")) else name


def _scalar(value: object) -> bool:
    """Not what a stranger's YAML may unfold to gigabytes."""
    return isinstance(value, (str, int, float))


def _network(record: Record) -> str:
    parameters, channels = record.num_parameters, record.settings.model.block_out_channels
    parts = [f"U-Net of {_si(parameters)} parameters" if parameters else "U-Net" if channels else ""]
    if channels:
        parts.append("channels " + ", ".join(map(str, channels)))
    return "; ".join(part for part in parts if part)


def _steps(record: Record) -> str:
    done, planned, batch = record.last_step, record.settings.training.steps, record.settings.training.batch_size
    if done is None:
        return "none yet" + (f" of {planned:,}" if planned else "")
    text = f"{done:,}" if not planned or done == planned else f"{done:,} of {planned:,}"
    return f"{text}, {batch} images each" if batch else text


def _speed(record: Record) -> str:
    speeds = sorted(speed for row in record.training if (speed := row.get("images_per_second")) is not None)
    processes = record.manifest.world_size
    text = f", {speeds[len(speeds) // 2]:,.0f} images/s" if speeds else ""
    return text + (f" on {processes} processes" if processes > 1 else "")


def made(scoring: Scoring) -> Facts:
    """The protocol of a scoring."""
    results, settings = scoring.results, scoring.settings
    sha256 = f", sha256 {results.extractor_sha256}" if results.extractor_sha256 else ""
    found = [
        ("Distance", _distance_meaning(results.metric)),
        ("Extractor", f"{results.extractor}{sha256}"),
        ("Reference", results.reference),
        ("Images", f"{results.num_images:,} per average"),
        ("Sampler", f"{scoring.sampler}; a step is one network evaluation per image"),
        *((title, settings[key]) for key, title in OPTIONAL.items() if settings.get(key, "none") != "none"),
        ("Seed", f"{results.seed}; image i has the same noise for all weights"),
        ("Scored step", f"{scoring.step:,}"),
    ]
    seconds = sum(row.seconds or 0.0 for row in scoring.rows)
    return [*found, ("Time", duration(seconds))] if seconds else found


def _distance_meaning(metric: str) -> str:
    if metric == "fid":
        return "Fr\u00e9chet Inception distance, comparable with published figures of the same protocol"
    return "Fr\u00e9chet distance in the features of the extractor below: no FID, not comparable with published FIDs"


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
