"""The names of weights, for every stage: what they look like and how they are written. No torch, no files are opened.

    raw   ema_0_999   power_0_075   bias_corrected_0_999   ema_0_999@1500   /models/ddpm-cifar10-32   raw+ema_0_999

A name is `raw`, an average's, that of a profile to reconstruct, or a diffusers folder; `@STEP` takes it at an earlier step;
`+` averages the predictions of several (an ensemble). A number has one spelling: `power_0_1` is read as `power_0_10`.
"""

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

NAME = re.compile(r"[A-Za-z0-9_-]+")
STEP = re.compile(r"[0-9]{1,15}")
# Every kind of profile but diffusers_ema with its fields, in the order of its name; `ddpm_ema.averaging.profiles` has what they mean.
FIELDS: dict[str, dict[str, type]] = {
    "constant": {"decay": float},
    "bias_corrected": {"decay": float},
    "warmup": {"decay": float, "inv_gamma": float, "power": float},
    "power_function": {"std": float},
    "uniform": {},
    "swa": {"start": int, "every": int},
    "hard_copy": {"every": int},
    "half_life": {"half_life": float, "ramp_up": float},
    "half_life_share": {"share": float},
    "window": {"length": int, "end": int},
    "cosine_cooldown": {"length": int, "end": int},
    "sqrt_cooldown": {"length": int, "end": int},
}
_SHORT = {"power_function": "power"}
_VALUES = {float: r"_(\d+_\d+)", int: r"_(\d{1,15})"}
_PATTERNS = {
    kind: re.compile(f"{_SHORT.get(kind, kind)}{''.join(_VALUES[of] for of in fields.values())}", re.ASCII)
    for kind, fields in FIELDS.items()
}


@dataclass(frozen=True)
class WeightName:
    """One member of what was named: a name, or a folder's path, and the step it is taken at (None: the checkpoint's)."""

    name: str
    step: int | None = None
    folder: bool = False

    def __str__(self) -> str:
        return self.name if self.step is None else f"{self.name}@{self.step}"


def parse(text: str, averages: Collection[str] = ()) -> tuple[WeightName, ...]:
    """The members of a name: one, or several of an ensemble. Names under `averages:` mean nothing else, however they are spelled.

    Raises ValueError for an empty name, or a step that is no number.
    """
    pieces, found = text.split("+"), []
    while pieces:
        # A folder may have + in its path, so the longest one that exists is taken; known names come first.
        known = [_known(piece.partition("@")[0], averages) for piece in pieces]
        lengths = (n for n in range(len(pieces), 1, -1) if os.path.isdir("+".join(pieces[:n])) and not all(known[:n]))
        taken = next(lengths, 1)
        found.append(_member("+".join(pieces[:taken]), text, averages))
        pieces = pieces[taken:]
    return tuple(found)


def _member(piece: str, text: str, averages: Collection[str]) -> WeightName:
    name, at, step = piece.partition("@")
    if not name:
        raise ValueError(f"{text!r}: an empty name; write NAME, NAME@STEP or NAME+NAME")
    if not _known(name, averages) and (os.path.isdir(piece) or not NAME.fullmatch(name)):
        return WeightName(piece, folder=True)
    if at and not STEP.fullmatch(step):
        raise ValueError(f"{text[:80]!r}: the part after @ must be a step, such as {name}@1500")
    return WeightName(name if name in averages else canonical(name), int(step) if at else None)


def split_step(text: str) -> tuple[str, int | None]:
    """ema_0_999@1500 -> ("ema_0_999", 1500); whatever is not one name at a step -> itself, None."""
    name, _, step = text.rpartition("@")
    return (name, int(step)) if NAME.fullmatch(name) and STEP.fullmatch(step) else (text, None)


def _known(name: str, averages: Collection[str]) -> bool:
    return name == "raw" or name in averages or profile_named(name) is not None


def name_of_profile(settings: Mapping[str, Any]) -> str:
    """{"kind": "power_function", "std": 0.075} -> power_0_075. The name holds no dot, which breaks diffusers' `variant=`."""
    kind, fields = settings["kind"], FIELDS.get(settings["kind"], {})  # a kind without a pattern is named alone
    values = [_spelled(of(settings[field])) for field, of in fields.items()]
    late = [f"after_{settings['start']}"] if "start" in settings and "start" not in fields else []
    return "_".join([_SHORT.get(kind, kind), *values, *late])


def profile_named(name: str) -> dict[str, Any] | None:
    """power_0_075 -> {"kind": "power_function", "std": 0.075}, whose range is not checked; None for another name."""
    rule, late, start = name.partition("_after_")  # any rule without a start of its own may begin late
    for kind, pattern in _PATTERNS.items():
        if match := pattern.fullmatch(rule):
            values = zip(FIELDS[kind].items(), match.groups(), strict=True)
            settings = {"kind": kind, **{field: of(text.replace("_", ".")) for (field, of), text in values}}
            if not late:
                return settings
            return {**settings, "start": int(start)} if STEP.fullmatch(start) and "start" not in settings else None
    return None


def canonical(name: str) -> str:
    """power_0_1 -> power_0_10; any other name as it is."""
    settings = profile_named(name)
    return name if settings is None else name_of_profile(settings)


def _spelled(value: float) -> str:
    """0.1 -> 0_10, 10.0 -> 10_00, 0.075 -> 0_075, the int 7 -> 7: the shortest digits that give the value back."""
    if isinstance(value, int):
        return str(value)
    whole, _, fraction = format(Decimal(repr(value)), "f").partition(".")
    return f"{whole}_{fraction.rstrip('0').ljust(2, '0')}"
