"""Lengths of averages in steps, in images, or as a share of a run, converted to steps."""

import re
from collections.abc import Mapping
from typing import Any

from ddpm_ema.averaging.profiles import PROFILES

_LENGTH = re.compile(r"(\d+(?:\.\d+)?) ?(%|img|kimg|Mimg)")
_IMAGES = {"img": 1.0, "kimg": 1e3, "Mimg": 1e6}


def in_steps(text: str, *, num_steps: int, batch_size: int) -> float | None:
    """A length in steps: of a share of the run ("5%") or of images ("500kimg"); None for text of another form."""
    match = _LENGTH.fullmatch(text)
    if match is None:
        return None
    number, unit = float(match[1]), match[2]
    return number * num_steps / 100.0 if unit == "%" else number * _IMAGES[unit] / batch_size


def resolve_lengths(settings: Mapping[str, Any], *, num_steps: int, batch_size: int) -> dict[str, Any]:
    """A profile's settings with every length in steps, for `profile_from_dict`.

    A length is a number of steps, a share of the run ("5%"), or images ("500kimg"; img, kimg and Mimg are 1, 1e3 and 1e6).

    Args:
        settings: from YAML, such as {"kind": "half_life", "half_life": "500kimg"}.
        num_steps: steps of the whole run.
        batch_size: images per step, over all processes.

    Raises:
        ValueError: a length is text of another form.
    """
    rule = PROFILES.get(str(settings.get("kind")))
    lengths = {"start": int, **(rule.lengths if rule else {})}
    resolved = dict(settings)
    for field, convert in lengths.items():
        if isinstance(text := settings.get(field), str):
            steps = in_steps(text, num_steps=num_steps, batch_size=batch_size)
            if steps is None:
                raise ValueError(
                    f"{field}: expected a number of steps, a share of the run such as 5%, or images such as 500kimg, "
                    f"got {text!r}"
                )
            resolved[field] = round(steps) if convert is int else steps
    return resolved
