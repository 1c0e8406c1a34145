"""The model card (README.md) of an exported pipeline: `templates/card.md`, filled in with what is known of the weights."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ddpm_ema.averaging.profiles import profile_from_dict
from ddpm_ema.config import Config, EvaluationSettings
from ddpm_ema.export.usage import Usage
from ddpm_ema.named_weights import NamedWeights
from ddpm_ema.numbers import decimals, figure, listed, metric_label, sampler_label, verdict_of, with_error
from ddpm_ema.rundir import RunDir
from ddpm_ema.weight_names import split_step

TEMPLATES = Path(__file__).parents[1] / "templates"


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


def render(
    config: Config, run: RunDir, weights: NamedWeights, usage: Usage, variant: str | None, scored: Sequence[Scored]
) -> str:
    """The card as Markdown. `variant`: the name that diffusers' variant has; `scored`: of exactly these weights, the newest first."""
    step = weights.step
    assert step is not None  # only folders and ensembles have none
    options: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    environment = Environment(loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, **options)
    environment.filters |= {"literal": _literal, "listed": listed, "thousands": "{:,}".format}
    return environment.get_template("card.md").render(
        config=config,
        folder=run.path.resolve().name,
        weights=weights,
        name=split_step(weights.name)[0],
        step=step,
        description=None if weights.profile is None else profile_from_dict(weights.profile).describe(step),
        dataset=_dataset(run, step),
        parameters=sum(parameter.numel() for parameter in usage.network.parameters()),
        scores=list(dict.fromkeys(map(_cells, scored))),
        only_fd=any(one.results.get("metric") != "fid" for one in scored),
        sampled=_sampled(usage.settings),
        usage=usage,
        variant=variant,
    )


def _dataset(run: RunDir, step: int) -> Mapping[str, Any]:
    """What the manifest of that step, or of the nearest later one, says of the data."""
    checkpoints = sorted(run.checkpoints(), key=lambda checkpoint: (checkpoint.step < step, checkpoint.step))
    return checkpoints[0].manifest.get("dataset", {}) if checkpoints else {}


def _literal(text: Any) -> str:
    """Text of somebody else's as one line of code: nothing in it is Markdown or HTML."""
    line = "".join(character if character.isprintable() else " " for character in str(text)).replace("`", "'")
    return f"`{' '.join(line.split())}`"


def _cells(scored: Scored) -> tuple[str, ...]:
    """One row of the table of scores."""
    results, row = scored.results, scored.row
    cells = (
        metric_label(results),
        figure(row["frechet_distance"], decimals(row.get("stderr"))),
        with_error(row.get("frechet_distance_unbiased"), row.get("stderr")),
        f"{row['num_images']:,}",
        _sampled(scored.evaluation),
        _literal(results["reference"]),
        _difference(row),
    )
    return tuple(cell.replace("|", "\\|").replace("\n", " ") for cell in cells)


def _sampled(settings: EvaluationSettings) -> str:
    return sampler_label(settings.model_dump()) + (", x_0 clipped" if settings.clip_sample else "")


def _difference(row: Mapping[str, Any]) -> str:
    """From raw, with its verdict and interval; raw has none, and neither has a row over other images."""
    if "significant" not in row:
        return figure(None)
    delta, error = row["delta_vs_raw"], row["delta_stderr"]
    low, high = (figure(bound, decimals(error), signed=True) for bound in row["interval"])
    return f"{with_error(delta, error, signed=True)} ({low} to {high}), {verdict_of(delta, row['significant'])}"
