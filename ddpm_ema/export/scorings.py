"""Which scorings of a run are of exactly the exported weights, and how they sampled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ddpm_ema.config import EvaluationSettings
from ddpm_ema.rundir import RunDir


@dataclass(frozen=True)
class Scored:
    """One row of a results.json, and the evaluation settings that it was sampled with."""

    results: Mapping[str, Any]
    row: Mapping[str, Any]
    evaluation: EvaluationSettings


def scorings_of(run: RunDir, name: str, step: int, key: str | None) -> list[Scored]:
    """Rows of exactly these weights, of sweeps, too; the newest scoring first. Results that cannot be read count as none.

    Args:
        run: the run directory.
        name: of the weights, without @STEP.
        step: of training.
        key: what `weights_sha256` of their rows is; where it is unknown on one side, name and step decide.
    """
    found = []
    for folder in run.score_dirs():
        try:
            results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
            evaluation = EvaluationSettings.model_validate(results["evaluation"])
            for row in [*results["rows"], *results.get("sweep", [])]:
                known = key is not None and "weights_sha256" in row
                if row["weights_sha256"] == key if known else _named(row["weights"], results["step"], name, step):
                    found.append(Scored(results, row, evaluation))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return sorted(found, key=lambda one: (one.results["step"], one.results.get("finished", "")), reverse=True)


def _named(written: str, scored_step: int, name: str, step: int) -> bool:
    """NAME in a scoring of that step, or NAME@STEP in any."""
    return (written, scored_step) == (name, step) or written == f"{name}@{step}"
