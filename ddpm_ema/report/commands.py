"""The command lines that the page prints: they run as printed, in this folder, and repeat a scoring's settings."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from ddpm_ema.report.record import Record, Scoring
from ddpm_ema.weight_names import WeightName, parse

SWEEP = "0.02:0.25:12"
KEY = re.compile(r"[a-z_0-9]+")


def train(record: Record) -> str:
    return f"ddpm-ema train {_run(record)}"


def report(*records: Record, scoring: Scoring | None = None) -> str:
    chosen = ["--scoring", shlex.quote(scoring.folder)] if scoring else []
    return " ".join(["ddpm-ema report", *map(_run, records), *chosen])


def score(record: Record, scoring: Scoring | None = None, **changes: Any) -> str:
    """Scores the run by the settings of `scoring`, or by its own, with `changes` of the evaluation settings (`steps="all"`).

    Where the feature classifier is missing that this needs, the command that trains it comes first.
    """
    own = record.settings.evaluation
    wanted = dict(own)
    if scoring is not None:
        wanted |= {**scoring.evaluation, **_same_weights(record, scoring)}
    for key, value in changes.items():
        before = wanted.get(key)
        wanted[key] = {**before, **value} if isinstance(before, Mapping) and isinstance(value, Mapping) else value
    overrides = map(shlex.quote, _overrides(wanted, own))
    command = " ".join(["ddpm-ema score", _run(record), *overrides])
    if "classifier" in wanted.get("extractors", ()) and not (record.path / "features.safetensors").is_file():
        return f"ddpm-ema features {_run(record)}\n{command}"
    return command


def sweep(record: Record, scoring: Scoring) -> str:
    return score(record, scoring, sweep={"stds": SWEEP})


def export(record: Record, scoring: Scoring, weights: str) -> str:
    """Empty for what is no single set of weights of this run: an ensemble, a folder."""
    try:
        name, *others = parse(weights, record.profiles)
    except ValueError:
        return ""
    if others or name.folder or weights.startswith("-"):
        return ""
    at_step = WeightName(name.name, scoring.step if name.step is None else name.step)
    return f"ddpm-ema export {_run(record)} {at_step}"


def _run(record: Record) -> str:
    """The run directory, which is an argument even if its name begins like an option."""
    path = str(record.path)
    return shlex.quote(f"./{path}" if path.startswith("-") else path)


def _same_weights(record: Record, scoring: Scoring) -> dict[str, Any]:
    """`last` and "all averages" spelled out, where they would now mean other weights than they did."""
    found: dict[str, Any] = {}
    if record.manifest.step not in (None, scoring.step) or scoring.evaluation.get("steps", "last") != "last":
        found["steps"] = [scoring.step]
    if not scoring.evaluation.get("weights") and record.settings.evaluation.get("weights"):
        found["weights"] = ["raw", *record.profiles]
    return found


def _overrides(wanted: Mapping[str, Any], own: Any, prefix: str = "evaluation") -> Iterator[str]:
    """`--evaluation.key`, value ... of every setting that config.yaml does not have so."""
    own = own if isinstance(own, Mapping) else {}
    for key, value in wanted.items():
        if not KEY.fullmatch(key) or (key in own and own[key] == value) or value == []:
            continue
        if isinstance(value, Mapping):
            yield from _overrides(value, own.get(key), f"{prefix}.{key}")
        else:
            yield f"--{prefix}.{key.replace('_', '-')}"
            yield from map(_token, value if isinstance(value, list) else [value])


def _token(value: Any) -> str:
    """A value as the command line reads it: text as it stands, if it is no option and shows what it is; else JSON."""
    plain = isinstance(value, str) and value.isprintable() and not value.startswith("-")
    return value if plain else json.dumps(value, default=str)
