"""The record of a run → one self-contained HTML page: its content, section by section, and the template filled in."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from ddpm_ema import numbers
from ddpm_ema.report import answer, commands, compare, facts, figures
from ddpm_ema.report.gallery import galleries
from ddpm_ema.report.plot import Look, Plot, Series, csv_uri, looks
from ddpm_ema.report.record import Record, Row, Scoring

TEMPLATES = Path(__file__).parents[1] / "templates"
Looks = Mapping[str, Look]
FURTHER = (("kid", "KID", 5), ("precision", "Precision", 3), ("recall", "Recall", 3))
"""Further columns of the table of weights: key, title, digits after the point."""
CURVES = (
    ("loss", "Training loss", "loss", "Mean over the steps since the previous row.", False),
    ("grad_norm", "Gradient norm", "global norm", "Before clipping.", False),
    ("learning_rate", "Learning rate", "learning rate", "", True),
    ("images_per_second", "Speed", "images/s", "Over all processes.", True),
)
"""Plots of metrics.jsonl: key, title, label of y, caption, whether the axis is always linear."""
POLICY = (
    "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; "
    "style-src 'sha256-{}'; script-src 'sha256-{}'"
)


@dataclass(frozen=True)
class Table:
    """The scores of one scoring, as the page shows them."""

    scoring: Scoring
    swept_look = Look("ink")

    @cached_property
    def rows(self) -> list[Row]:
        """All weights but candidates of sweeps, and of those the ones that the answer names."""
        shown = {*(row.weights for row in self.scoring.rows), *answer.judge(self.scoring).recommended}
        return [row for row in self.scoring.entries if row.weights in shown]

    def is_swept(self, row: Row) -> bool:
        return row.weights not in {own.weights for own in self.scoring.rows}

    @property
    def columns(self) -> list[tuple[str, str, int]]:
        given = [column for column in FURTHER if any(row.get(column[0]) is not None for row in self.rows)]
        return [column for column in given if column[0] != "precision" or not self.scoring.precision_note]

    @property
    def notes(self) -> list[str]:
        return list(filter(None, [self.scoring.saturation(self.rows), self.scoring.precision_note]))

    def place(self, value: float) -> float:
        """Where a difference from raw is drawn, in 0 ... 120: by its square root, because one average may be far worse."""
        gaps = [end for row in self.rows if row.versus_raw for end in (row.versus_raw.low, row.versus_raw.high)]
        low, high, at = (math.copysign(math.sqrt(abs(v)), v) for v in (min(0.0, *gaps), max(0.0, *gaps), value))
        return round(4 + 112 * (at - low) / (high - low or 1), 1)

    @property
    def csv(self) -> str:
        keys = ["weights", "frechet_distance_unbiased", "frechet_distance", "stderr", "delta_vs_raw", "delta_stderr"]
        keys += [f"{key}{end}" for key, _, _ in self.columns for end in ("", "_stderr")]
        rows = [
            [*(getattr(row, key, "") for key in keys), *(row.interval or ("", "")), answer.against_raw(row)]
            for row in self.rows
        ]
        return csv_uri([[*keys, "low", "high", "against_raw"], *rows])


def render(record: Record, scoring: Scoring | None) -> str:
    """The page as HTML, with the answer of `scoring`. Every value is escaped by the template."""
    look = looks(record.names)
    shown = [scoring, *answer.rivals(scoring, record.scorings)] if scoring else []
    content: dict[str, Any] = {"pictures": galleries(record, shown), "curves": _curves(record, look)}
    alike, quick = None, _quick(record, look)
    if scoring is not None:
        series = [(s.step, s.rows) for s in record.scorings if s.comparable(scoring)]
        caption, level = f"{scoring.conditions}.", figures.floor(scoring)
        alike = figures.distance(series, scoring.metric_name, caption, look, level)
        found = answer.answer(scoring, shown[1:])
        exports = filter(None, (commands.export(record, scoring, name) for name in found.recommended[:1]))
        content |= {"answer": found, "exports": "\n".join(exports), "sweep": _sweep(record, scoring)}
    content |= {
        "alike": alike,
        "over_steps": [plot for plot in (alike, quick) if plot],
        "tables": list(map(Table, shown)),
    }
    content["warnings"] = _warnings(record, scoring)  # last: problems found on the way are among them
    chosen = None if scoring is answer.newest(record.scorings) else scoring
    content["written_by"] = commands.report(record, scoring=chosen)
    title = record.path.resolve().name
    return _fill("report.html", [record], title=title, record=record, scoring=scoring, looks=look, **content)


def render_runs(compared: Sequence[compare.Run]) -> tuple[str, str]:
    """The page that sets several runs side by side, and its sentence."""
    look = looks(run.name for run in compared)
    plots = [*compare.plots(compared, look)]
    for key, title, label, caption, linear in CURVES:
        series = [Series(run.name, look[run.name], figures.column(run.record.training, key)) for run in compared]
        plots.append(figures.over_training(series, title, label, caption, linear=linear))
    content: dict[str, Any] = {"compared": compared, "plots": [plot for plot in plots if plot]}
    seeds = compare.seeds(compared)
    content |= {"pictures": compare.gallery(compared), "seeds": seeds, "sentence": compare.sentence(compared, seeds)}
    warnings = [f"{run.name}: {text}" for run in compared for text in run.record.problems]
    title, records = " and ".join(run.name for run in compared), [run.record for run in compared]
    content["written_by"] = commands.report(*records)
    return _fill("runs.html", records, title=title, warnings=warnings, **content), content["sentence"]


def _fill(template: str, records: Sequence[Record], **content: Any) -> str:
    """The template with style sheet, script, and the policy that lets nothing else run."""
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    environment.filters["names"] = _name_marker(records)
    environment.globals |= {"numbers": numbers, "answers": answer, "commands": commands, "compare": compare}
    environment.globals |= {"facts": facts, "figures": figures}
    style, script = (Markup((TEMPLATES / name).read_text()) for name in ("page.css", "page.js"))
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    return environment.get_template(template).render(
        style=style, script=script, policy=Markup(POLICY.format(*digests)), **content
    )


def _quick(record: Record, look: Looks) -> Plot | None:
    """The quick scorings while training."""
    if not record.quick:
        return None
    evaluation, series = record.settings.evaluation, [(row.step, row.scores or ()) for row in record.quick]
    images, sampler, steps = (evaluation.get(key) for key in ("every_num_images", "sampler", "num_inference_steps"))
    label = "Quick FID" if series[-1][1][0].metric == "fid" else "Quick FD"
    label += f" ({images:,} images)" if isinstance(images, int) else ""
    known = f" (config.yaml: {sampler} in {steps} steps)" if isinstance(sampler, str) and isinstance(steps, int) else ""
    return figures.distance(series, label, f"Scored while training{known}.", look)


def _sweep(record: Record, scoring: Scoring) -> dict[str, Sequence[Any]]:
    """The plots of the newest scoring that has a sweep, `scoring` before all others, and the warnings of its rows."""
    later = sorted((s for s in record.scorings if s is not scoring), key=lambda s: (s.step, s.finished), reverse=True)
    for source in (scoring, *later):
        plots = [plot for key in figures.WIDTHS for plot in figures.sweep(source, key)]
        if plots:
            notes = list(filter(None, [source.saturation(source.sweep)]))
            notes += [f"{row.weights}: {text}" for row in source.sweep for text in row.warnings]
            return {"plots": plots, "warnings": notes}
    return {"plots": (), "warnings": ()}


def _curves(record: Record, look: Looks) -> list[Plot]:
    rows = record.training
    found = [figures.weightings(record.manifest.weightings, look)] + [figures.curve(rows, *fields) for fields in CURVES]
    found[2:2] = [figures.quarters(rows, record.settings.num_train_timesteps), figures.distances(rows, look)]
    if any(row.get("skipped_steps") for row in rows):
        caption = "Steps that mixed precision skipped because a gradient overflowed; they changed no average."
        found.append(figures.curve(rows, "skipped_steps", "Skipped steps", "steps", caption))
    return [plot for plot in found if plot is not None]


def _warnings(record: Record, scoring: Scoring | None) -> list[str]:
    """What to know before trusting the page: about files, the scoring, single rows, and how they belong together."""
    found = list(record.problems)
    if not (record.path / "config.yaml").is_file():
        found.append("config.yaml is missing; the commands on this page need it.")
    if scoring is not None:
        rows = Table(scoring).rows
        texts = dict.fromkeys((*scoring.warnings, *(text for row in rows for text in row.warnings)))
        found += [f"{_whose(rows, text)}{text}" for text in texts if text != scoring.precision_note]
        if record.last_step is not None and scoring.step < record.last_step:
            found.append(
                f"Step {scoring.step:,} was scored, and training has gone on to step {record.last_step:,}: "
                "this page recommends weights of the earlier step."
            )
    return list(dict.fromkeys(found))


def _whose(rows: Sequence[Row], text: str) -> str:
    """`raw and ema_0_999: ` before a warning of some rows; nothing before one of all rows, or of the scoring itself."""
    names = [row.weights for row in rows if text in row.warnings]
    return f"{numbers.listed(names)}: " if 0 < len(names) < len(rows) else ""


def _name_marker(records: Sequence[Record]) -> Callable[[str], Markup]:
    """A filter that sets the names of weights in a sentence in code type, and breaks no line at ±; all is escaped first."""
    scored = (row.weights for record in records for one in record.scorings for row in (*one.rows, *one.sweep))
    names = sorted({*(name for record in records for name in record.names), *scored}, key=len, reverse=True)
    pattern = re.compile(r"(?<![\w@&#-])(" + "|".join(re.escape(str(escape(name))) for name in names) + r")(?![\w@-])")

    def mark(text: str) -> Markup:
        kept = str(escape(text)).replace(" \u00b1 ", "\u00a0\u00b1\u00a0")
        return Markup(pattern.sub(r"<code>\1</code>", kept))

    return mark
