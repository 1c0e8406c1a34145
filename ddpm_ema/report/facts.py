"""What was trained, on what, and for how long: words and their values for the page."""

from typing import Any

from ddpm_ema.messages import clock
from ddpm_ema.report.record import Record, plain


def run(record: Record) -> list[tuple[str, str]]:
    """What was trained, on what, how long, of what is known."""
    settings, manifest = record.settings, record.manifest
    size = f"{settings.image_size}\u00d7{settings.image_size}" if settings.image_size else ""
    size += {1: " grey", 3: " RGB"}.get(settings.channels or 0, "")
    data = [manifest.data_name or settings.data_name or settings.data_source]
    data += [f"{manifest.data_size:,} images" if manifest.data_size else "", size]
    channels = [] if settings.factory else list(map(str, settings.block_out_channels))
    kind = settings.factory or "U-Net"
    network = [f"{kind} of {record.num_parameters:,} parameters" if record.num_parameters else ""]
    network += [f"channels {', '.join(channels)}" if channels else ""]
    done, planned = record.last_step, settings.training_steps
    steps = ["none yet" if done is None else f"{done:,}" + (f" of {planned:,}" if planned and planned != done else "")]
    steps += [f"{settings.batch_size} images per step" if settings.batch_size and done else ""]
    seconds = sum(row.get("seconds") or 0.0 for row in record.training)
    speeds = sorted(speed for row in record.training if (speed := row.get("images_per_second")) is not None)
    time = [clock(seconds) if seconds else "", f"{speeds[len(speeds) // 2]:,.0f} images/s" if speeds else ""]
    time += [f"{manifest.world_size} processes" if manifest.world_size > 1 else ""]
    weights = [_rule(name, record.profiles.get(name, {})) for name in record.names]
    words = {"Data": data, "Network": network, "Steps": steps, "Time": time, "Weights": weights}
    return [(word, ", ".join(filter(None, parts))) for word, parts in words.items() if any(parts)]


def _rule(name: str, rule: dict[str, Any]) -> str:
    """`power_0_10 (power_function, std 0.1)`. Scalars only: a stranger's YAML may unfold to gigabytes."""
    fields = {key: value for key, value in rule.items() if isinstance(value, (str, int, float))}
    if (kind := fields.pop("kind", None)) is None:
        return name
    return f"{name} ({', '.join([str(kind), *(f'{key} {plain(value)}' for key, value in fields.items())])})"
