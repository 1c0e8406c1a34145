"""Which scorings of a run are of exactly the exported weights, and how they sampled."""

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


def scorings_of(run: RunDir, key: str) -> list[Scored]:
    """Rows of exactly these weights (`weights_sha256` is `key`), of sweeps, too; the newest scoring first.

    Results that cannot be read count as none.
    """
    found = []
    for folder in run.score_dirs():
        try:
            results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
            evaluation = EvaluationSettings.model_validate(results["evaluation"])
            rows = [*results["rows"], *results.get("sweep", [])]
            found += [Scored(results, row, evaluation) for row in rows if row["weights_sha256"] == key]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return sorted(found, key=lambda one: (one.results["step"], one.results.get("finished", "")), reverse=True)
