"""The model card (README.md) of an exported pipeline: `templates/card.md`, filled in with what is known of the weights."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ddpm_ema.averaging.profiles import profile_from_dict
from ddpm_ema.config import Config, EvaluationSettings
from ddpm_ema.export.usage import Usage
from ddpm_ema.messages import logger
from ddpm_ema.named_weights import NamedWeights
from ddpm_ema.numbers import decimals, figure, listed, sampler_label, verdict_of, with_error
from ddpm_ema.report.reading import read_scorings
from ddpm_ema.report.record import Record, Row, Scoring
from ddpm_ema.rundir import RunDir
from ddpm_ema.weight_names import split_step

TEMPLATES = Path(__file__).parents[1] / "templates"


class Scored(NamedTuple):
    """One row of a scoring, and the evaluation settings that it was sampled with."""

    scoring: Scoring
    row: Row
    evaluation: EvaluationSettings


def scorings_of(run: RunDir, key: str) -> list[Scored]:
    """Rows of exactly these weights (`weights_sha256` is `key`), of sweeps, too; the newest scoring first.

    Results that cannot be read count as none, with a warning.
    """
    record, found = Record(run.path), []
    read_scorings(record)
    for scoring in record.scorings:
        rows = [row for row in (*scoring.rows, *scoring.sweep) if row.weights_sha256 == key]
        try:
            found += [Scored(scoring, row, EvaluationSettings.model_validate(scoring.evaluation)) for row in rows]
        except ValueError:
            record.problems.append(f"scores/{scoring.folder} was skipped: its settings are not of this version")
    for problem in record.problems:
        logger.warning(_literal(problem).strip("`"))  # a terminal must not obey what a file holds
    return sorted(found, key=lambda one: (one.scoring.step, one.scoring.finished), reverse=True)


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
        only_fd=any(one.scoring.metric != "fid" for one in scored),
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
    scoring, row, evaluation = scored
    cells = (
        "FID" if scoring.metric == "fid" else f"FD ({_literal(scoring.extractor)})",
        figure(row.frechet_distance, decimals(row.stderr)),
        with_error(row.frechet_distance_unbiased, row.stderr),
        f"{row.num_images:,}",
        _sampled(evaluation),
        _literal(scoring.reference),
        _difference(row),
    )
    return tuple(cell.replace("|", "\\|") for cell in cells)


def _sampled(settings: EvaluationSettings) -> str:
    return sampler_label(settings.model_dump()) + (", x_0 clipped" if settings.clip_sample else "")


def _difference(row: Row) -> str:
    """From raw, with its verdict and interval; raw has none, and neither has a row over other images."""
    if (gap := row.versus_raw) is None:
        return figure(None)
    low, high = (figure(bound, decimals(gap.stderr), signed=True) for bound in (gap.low, gap.high))
    delta = with_error(gap.delta, gap.stderr, signed=True)
    return f"{delta} ({low} to {high}), {verdict_of(gap.delta, gap.significant)}"
