"""The record of a run → one self-contained HTML page: its content, section by section, and the template filled in."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from ddpm_ema import numbers
from ddpm_ema.report import answer, commands, compare, facts, figures
from ddpm_ema.report.gallery import galleries
from ddpm_ema.report.plot import Look, Plot, Series, csv_uri, looks
from ddpm_ema.report.record import Record, Row, Scoring

TEMPLATES = Path(__file__).parents[1] / "templates"
Looks = Mapping[str, Look]
FURTHER = (("kid", "KID", 5), ("inception_score", "IS", 2), ("precision", "Precision", 3), ("recall", "Recall", 3))
"""Further columns of the table of weights: key, title, digits after the point."""
CURVES = (
    ("loss", "Training loss", "loss", "Mean over the steps since the previous row.", False),
    ("grad_norm", "Gradient norm", "global norm", "Before clipping.", False),
    ("learning_rate", "Learning rate", "learning rate", "", True),
    ("images_per_second", "Speed", "images/s", "Over all processes.", True),
)
"""Plots of metrics.jsonl: key, title, label of y, caption, whether the axis is always linear."""


class Table(NamedTuple):
    """One scoring's rows, its own answer, and notes on its columns. `differs`: from the settings of the first table."""

    scoring: Scoring
    answer: answer.Answer
    columns: tuple[tuple[str, str, int], ...]
    notes: tuple[str, ...]
    differs: str

    def place(self, value: float) -> float:
        """Where a difference from raw is drawn, in 2 ... 118."""
        gaps = [gap for row in self.scoring.rows if (gap := row.versus_raw)]
        low, high = min(0.0, *(gap.low for gap in gaps)), max(0.0, *(gap.high for gap in gaps))
        return round(2 + 116 * (value - low) / (high - low or 1), 1)

    @property
    def csv(self) -> str:
        keys = ("weights", "frechet_distance_unbiased", "frechet_distance", "stderr", "delta_vs_raw", "delta_stderr")
        keys += tuple(key for key, _, _ in self.columns)
        return csv_uri([(*keys, "against_raw"), *((*(getattr(r, k, "") for k in keys), answer.against_raw(r)) for r in self.scoring.rows)])


def render(record: Record, scoring: Scoring | None) -> str:
    """The page as HTML, with the answer of `scoring`. Every value is escaped by the template."""
    look = looks(record.names)
    content = {
        "title": record.path.resolve().name,
        "facts": facts.run(record),
        "profiles": figures.weightings(record.manifest.weightings, look),
        "curves": _curves(record, look),
        "train": commands.train(record),
        "score": commands.score(record),
        "report": commands.report(record),
        "pictures": galleries(record, _shown(record, scoring)),
        "over_steps": [],
    }
    if quick := _quick(record, look):
        content["over_steps"].append(quick)
    if scoring is not None:
        content |= _scored(record, scoring, look, quick)
    content["warnings"] = _warnings(record, scoring)  # last: problems found on the way are among them
    return _fill("report.html", [record], record=record, looks=look, scoring=scoring, **content)


def _fill(template: str, records: Sequence[Record], **content: Any) -> str:
    """The template with style sheet, script, and the policy that lets nothing else run."""
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    environment.filters["names"] = _name_marker(records)
    environment.globals.update(figure=numbers.figure, with_error=numbers.with_error, decimals=numbers.decimals)
    environment.globals["against_raw"] = answer.against_raw
    style, script = (Markup((TEMPLATES / name).read_text()) for name in ("page.css", "page.js"))
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    policy = "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; style-src 'sha256-{}'; script-src 'sha256-{}'"
    return environment.get_template(template).render(
        style=style, script=script, policy=Markup(policy.format(*digests)), **content
    )


def render_runs(compared: Sequence[compare.Run]) -> str:
    """The page that sets several runs side by side."""
    look = {run.name: Look(f"c{i % 7}") for i, run in enumerate(compared)}
    scored = [run for run in compared if run.scoring is not None]
    curves = (
        figures.over_training(
            [Series(run.name, look[run.name], figures.column(run.record.training, key)) for run in compared],
            *(title, label, caption),
            linear=linear,
        )
        for key, title, label, caption, linear in CURVES
    )
    warnings = [f"{run.name}: {text}" for run in compared for text in _warnings(run.record, run.scoring)]
    return _fill(
        "runs.html",
        [run.record for run in compared],
        title=" and ".join(run.name for run in compared),
        sentence=compare.sentence(compared),
        table=compare.runs(compared),
        answers=[(run.name, answer.judge(run.scoring).sentence, commands.report(run.record)) for run in scored],
        plots=[plot for plot in (*compare.plots(scored, look), *curves) if plot],
        pictures=compare.gallery(scored),
        warnings=warnings,
        report=commands.report_runs([run.record for run in compared]),
    )


def _shown(record: Record, scoring: Scoring | None) -> list[Scoring]:
    return [] if scoring is None else [scoring, *answer.rivals(scoring, record.scorings)]


def _scored(record: Record, scoring: Scoring, look: Looks, quick: Plot | None) -> dict[str, Any]:
    """The content about the run's scorings."""
    shown = _shown(record, scoring)
    found = answer.answer(scoring, shown[1:])
    alike = sorted((s for s in record.scorings if s.comparable(scoring)), key=lambda s: s.step)
    series = [(s.step, s.rows) for s in alike]
    floor = figures.floor(scoring)
    curve = figures.distance(series, scoring.metric_name, f"{scoring.conditions}.", look, floor)
    offered = [*found.recommended[:1], *(note.export for note in found.notes if note.export)]
    return {
        "answer": found,
        "tables": [_table(one, answer.differing(scoring, one) if one is not scoring else "") for one in shown],
        "over_steps": [plot for plot in (curve, quick) if plot],
        "curve": curve,
        "sweep": _sweep(record, scoring),
        "made": facts.made(scoring),
        "others": compare.scorings(record, scoring),
        "exports": list(filter(None, (commands.export(record, scoring, name) for name in offered))),
        "sweep_command": commands.sweep(record, scoring),
        "steps_command": commands.score(record, scoring, steps="all"),
    }


def _table(scoring: Scoring, differs: str) -> Table:
    columns = tuple(column for column in FURTHER if any(row.get(column[0]) is not None for row in scoring.rows))
    notes = [*answer.saturation(scoring, scoring.rows)]
    if any(key == "precision" for key, _, _ in columns):
        notes += filter(None, [_precision_note(scoring)])
    return Table(scoring, answer.judge(scoring), columns, tuple(notes), differs)


def _precision_note(scoring: Scoring) -> str:
    """Where precision says nothing: a small classifier's features of noise may lie among those of the data."""
    reached = scoring.precision_of_noise
    if not numbers.says_nothing(reached):
        return ""
    return f"Precision says nothing here: images of pure noise reach {reached:.2f} with this extractor and reference."


def _quick(record: Record, look: Looks) -> Plot | None:
    """The quick scorings while training."""
    if not record.quick:
        return None
    evaluation, series = record.settings.evaluation, [(row.step, row.scores or ()) for row in record.quick]
    images, sampler, steps = (evaluation.get(key) for key in ("every_num_images", "sampler", "num_inference_steps"))
    label = f"{'FID' if series[-1][1][0].metric == 'fid' else 'FD'} while training"
    label += f" ({images:,} images)" if isinstance(images, int) else ""
    known = isinstance(sampler, str) and isinstance(steps, int)
    caption = f"Scored while training{f' (config.yaml: {sampler} in {steps} steps)' if known else ''}."
    return figures.distance(series, label, caption, look)


def _sweep(record: Record, scoring: Scoring) -> dict[str, Sequence[Any]]:
    """The plots of the newest scoring that has a sweep, `scoring` before all others, and the warnings of its rows."""
    later = sorted((s for s in record.scorings if s is not scoring), key=lambda s: (s.step, s.finished), reverse=True)
    for source in (scoring, *later):
        plots = [plot for key in figures.WIDTHS for plot in figures.sweep(source, key, _precision_note(source))]
        if plots:
            texts = [f"{row.weights}: {text}" for row in source.sweep for text in row.warnings]
            return {"plots": plots, "warnings": [*answer.saturation(source, source.sweep), *texts]}
    return {"plots": (), "warnings": ()}


def _curves(record: Record, look: Looks) -> list[Plot]:
    rows = record.training
    found = [figures.curve(rows, *fields) for fields in CURVES]
    found[1:1] = [figures.quarters(rows, record.settings.num_train_timesteps), figures.distances(rows, look)]
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
        texts = dict.fromkeys((*scoring.warnings, *(text for row in scoring.rows for text in row.warnings)))
        found += [f"{_whose(scoring, text)}{text}" for text in texts]
        if record.last_step is not None and scoring.step < record.last_step:
            found.append(
                f"Step {scoring.step:,} was scored, and training has gone on to step {record.last_step:,}: "
                "this page recommends weights of the earlier step."
            )
    return list(dict.fromkeys(found))


def _whose(scoring: Scoring, text: str) -> str:
    """`raw and ema_0_999: ` before a warning of some rows; nothing before one of all rows, or of the scoring itself."""
    names = [row.weights for row in scoring.rows if text in row.warnings]
    return f"{numbers.listed(names)}: " if 0 < len(names) < len(scoring.rows) else ""


def _name_marker(records: Sequence[Record]) -> Callable[[str], Markup]:
    """A filter that sets the names of weights in a sentence in code type; everything is escaped first."""
    scored = (row.weights for record in records for one in record.scorings for row in (*one.rows, *one.sweep))
    names = sorted({*(name for record in records for name in record.names), *scored}, key=len, reverse=True)
    pattern = re.compile(r"(?<![\w@&#-])(" + "|".join(re.escape(str(escape(name))) for name in names) + r")(?![\w@-])")

    def mark(text: str) -> Markup:
        return Markup(pattern.sub(r"<code>\1</code>", str(escape(text))))

    return mark
