"""Any average after the fact, from a run directory: its snapshots of power-function averages → weights of another profile."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddpm_ema.averaging.posthoc import Reconstruction, Snapshot, reconstruct
from ddpm_ema.averaging.profiles import PowerFunction, Profile, profile_from_dict, profile_to_dict
from ddpm_ema.errors import UserError
from ddpm_ema.rundir import RunDir, atomic_save, step_folder

POWER = re.compile(r"power_0_(\d+)")


@dataclass(frozen=True)
class Reconstructed:
    """An average that no one kept while training."""

    name: str
    target: Profile
    step: int
    result: Reconstruction

    def summary(self) -> dict[str, Any]:
        """Plain objects: what was asked for and how well it was got."""
        coefficients = self.result.coefficients
        return {
            "weights": self.name,
            "profile": profile_to_dict(self.target),
            "step": self.step,
            "profile_error": coefficients.profile_error,
            "condition_number": coefficients.condition_number,
            "amplification": coefficients.amplification,
            "num_snapshots": len(coefficients.weights),
            "warnings": list(self.result.warnings),
        }


def snapshots_of(run: RunDir) -> list[Snapshot]:
    """Every snapshot of the run, by step. Raises UserError where there is none."""
    try:
        found = [Snapshot.open(path) for paths in run.snapshots().values() for path in paths]
    except (ValueError, OSError) as error:
        raise UserError(f"{run.path}: a snapshot cannot be read: {error}") from None
    if not found:
        raise UserError(
            f"{run.path}: holds no snapshots, so no other average can be reconstructed; train with two power_function "
            "averages (such as std 0.05 and 0.10) and checkpoints.snapshots_every"
        )
    return sorted(found, key=lambda snapshot: snapshot.step)


def reconstruct_from(run: RunDir, target: Profile, step: int | None = None) -> Reconstructed:
    """The average with profile `target` as it would stand after `step` steps; by default the last step with a snapshot.

    Raises UserError for a run without snapshots, and for a step that none was stored at (the nearest ones are named).
    """
    snapshots = snapshots_of(run)
    at = snapshots[-1].step if step is None else step
    try:
        return Reconstructed(name_of(target), target, at, reconstruct(snapshots, at, target))
    except (ValueError, OSError) as error:
        raise UserError(f"{run.path}: {name_of(target)} cannot be reconstructed at step {at}: {error}") from None


def save(reconstructed: Reconstructed, folder: Path) -> Path:
    """Writes `<folder>/<name>.safetensors`, fp32 by parameter name; the file's metadata says what it is and how good."""
    path = folder / f"{reconstructed.name}.safetensors"
    summary = reconstructed.summary()
    metadata = {"step": str(reconstructed.step), "profile": json.dumps(summary["profile"])}
    try:
        atomic_save(path, reconstructed.result.weights, metadata | {"reconstruction": json.dumps(summary)})
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another folder with --out") from None
    return path


def default_folder(run: RunDir, step: int) -> Path:
    return run.path / "reconstructed" / step_folder(step)


def target_named(name: str) -> Profile | None:
    """power_0_075 -> the power function of width 0.075; None for a name that is no reconstructed width."""
    match = POWER.fullmatch(name)
    if match is None:
        return None
    try:
        return PowerFunction(std=float(f"0.{match[1]}"))
    except ValueError as error:
        raise UserError(f"{name!r}: {error}") from None


def name_of(target: Profile) -> str:
    """The name of a reconstructed average: power_0_075, constant_0_999, uniform. Holds no dot, see design of names."""
    kind, *values = profile_to_dict(target).values()
    kind = "power" if kind == "power_function" else kind
    return re.sub(r"[^A-Za-z0-9_-]", "_", "_".join([kind, *(f"{value:.12g}" for value in values)]))


def parse_target(text: str) -> Profile:
    """`power_function:std=0.075`, `swa:start=1000,every=100`, `uniform` or `power_0_075` -> a profile.

    Raises UserError that names the field, or the nearest kind.
    """
    if (named := target_named(text)) is not None:
        return named
    kind, _, fields = text.partition(":")
    values: dict[str, Any] = {"kind": kind}
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
        help="power_function:std=0.075, constant:decay=0.999, bias_corrected:decay=0.9999, uniform, ...; may be repeated",
    )
    parser.add_argument("--step", type=int, default=None, help="step it would stand at (default: the last snapshot's)")
    parser.add_argument(
        "--out", type=Path, default=None, help="folder of the files (default: RUN/reconstructed/step-N)"
    )
    arguments = parser.parse_args(argv)
    targets = [parse_target(text) for text in arguments.target]
    run = RunDir(arguments.run)
    made = [_make(run, target, arguments.step, arguments.out) for target in targets]
    print(table([summary for _, summary in made]))
    for path, _ in made:
        print(f"wrote {path}")
    return [path for path, _ in made]


def _make(run: RunDir, target: Profile, step: int | None, folder: Path | None) -> tuple[Path, dict[str, Any]]:
    """One target; its weights are let go before the next one's are made."""
    found = reconstruct_from(run, target, step)
    return save(found, folder or default_folder(run, found.step)), found.summary()
