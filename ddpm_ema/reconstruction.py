"""The command line of scripts/reconstruct.py: a run's snapshots → files of averages that no one kept."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ddpm_ema import config as settings
from ddpm_ema.averaging.profiles import Profile, profile_from_dict
from ddpm_ema.errors import UserError
from ddpm_ema.named_weights import NamedWeights, WeightResolver, name_of
from ddpm_ema.rundir import RunDir, atomic_save, step_folder
from ddpm_ema.weight_names import profile_named


def save(weights: NamedWeights, target: Profile, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Writes `<folder>/<name>.safetensors`, fp32 by parameter name; the file's metadata says what it is and how good.

    Returns the file, and as plain objects what was asked for and how well it was matched.
    """
    path = folder / f"{name_of(target)}.safetensors"
    summary: dict[str, Any] = {"weights": name_of(target), "profile": weights.profile, "step": weights.step}
    summary |= {**(weights.reconstruction or {}), "warnings": list(weights.warnings)}
    metadata = {"step": str(weights.step), "profile": json.dumps(weights.profile)}
    try:
        atomic_save(path, weights.members[0](), metadata | {"reconstruction": json.dumps(summary)})
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another folder with --out") from None
    return path, summary


def default_folder(run: RunDir, weights: NamedWeights) -> Path:
    assert weights.step is not None
    return run.path / "reconstructed" / step_folder(weights.step)


def parse_target(text: str) -> Profile:
    """`power_function:std=0.075`, `swa:start=1000,every=100`, or a name such as `power_0_075` or `uniform` -> a profile.

    Raises UserError that names the field, or the nearest kind.
    """
    kind, _, fields = text.partition(":")
    values: dict[str, Any] = profile_named(text) or {"kind": kind}
    for field in filter(None, fields.split(",")):
        key, equals, value = field.partition("=")
        if not equals:
            raise UserError(
                f"--target {text}: {field!r} is not FIELD=VALUE; write for example power_function:std=0.075"
            )
        values[key.strip()] = _number(value, text)
    try:
        return profile_from_dict(values)
    except ValueError as error:
        raise UserError(f"--target {text}: {error}") from None


def _number(value: str, text: str) -> int | float:
    try:
        return int(value)
    except ValueError:
        pass
    try:
        return float(value)
    except ValueError:
        raise UserError(f"--target {text}: {value!r} is not a number") from None


def table(summaries: Sequence[Mapping[str, Any]]) -> str:
    """How good each reconstruction is, for a terminal."""
    columns = ("weights", "step", "snapshots", "profile error", "condition", "amplification")
    cells = [
        (
            str(entry["weights"]),
            f"{entry['step']:,}",
            str(entry["num_snapshots"]),
            f"{entry['profile_error']:.2%}",
            f"{entry['condition_number']:.1e}",
            f"{entry['amplification']:.1f}",
        )
        for entry in summaries
    ]
    widths = [max(len(row[i]) for row in (columns, *cells)) for i in range(len(columns))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in (columns, *cells)
    ]
    warnings = [f"warning: {entry['weights']}: {text}" for entry in summaries for text in entry["warnings"]]
    return "\n".join([*lines, *warnings])


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """The command line of scripts/reconstruct.py: one file a target, then a table of how far each can be trusted."""
    parser = argparse.ArgumentParser(
        prog="reconstruct.py", description="Reconstructs averages that no one kept, from the snapshots of a run."
    )
    parser.add_argument("run", type=Path, help="the run directory, such as runs/digits")
    parser.add_argument(
        "--target",
        action="append",
        required=True,
        help="a name (power_0_075, bias_corrected_0_9999, uniform) or its fields (power_function:std=0.075); may be repeated",
    )
    parser.add_argument("--step", type=int, default=None, help="step it would stand at (default: the last snapshot's)")
    parser.add_argument(
        "--out", type=Path, default=None, help="folder of the files (default: RUN/reconstructed/step-N)"
    )
    arguments = parser.parse_args(argv)
    targets = [parse_target(text) for text in arguments.target]
    run = RunDir(arguments.run)
    config = settings.load(run.config_path) if run.config_path.is_file() else None
    found = [(target, WeightResolver(run, None, config).reconstructed(target, arguments.step)) for target in targets]
    # Tensors are made one target at a time, and let go once they are written.
    made = [save(weights, target, arguments.out or default_folder(run, weights)) for target, weights in found]
    print(table([summary for _, summary in made]))
    for path, _ in made:
        print(f"wrote {path}")
    return [path for path, _ in made]
