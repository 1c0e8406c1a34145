"""The record of a run → one self-contained HTML page: its content, section by section, and the template filled in."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from ddpm_ema import numbers
from ddpm_ema.report import answer, commands, facts, figures
from ddpm_ema.report.drawing import Drawing, Look, looks, style
from ddpm_ema.report.reading import picture
from ddpm_ema.report.record import Record, Scoring

TEMPLATES = Path(__file__).parents[1] / "templates"
MAX_IMAGE_BYTES = 24 * 2**20  # a larger page no longer opens well on a phone
Looks = Mapping[str, Look]


FURTHER = (("kid", "KID", 5), ("precision", "Precision", 3), ("recall", "Recall", 3))
"""Further columns of the table of weights: key, title, digits after the point."""


class Table(NamedTuple):
    """One scoring's rows, its own answer, and notes on its columns. `differs`: from the settings of the first table."""

    scoring: Scoring
    answer: answer.Answer
    columns: tuple[tuple[str, str, int], ...]
    notes: tuple[str, ...]
    differs: str = ""


def render(record: Record, scoring: Scoring | None) -> str:
    """The page as HTML, with the answer of `scoring`. Every value is escaped by the template."""
    look = looks(record.names)
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    environment.filters["names"] = _name_marker(record)
    environment.globals.update(figure=numbers.figure, with_error=numbers.with_error, decimals=numbers.decimals)
    environment.globals["against_raw"] = answer.against_raw
    with style():
        content = _content(record, look) | _scored(record, scoring, look)
    content["warnings"] = _warnings(record, scoring)  # last: problems found on the way are among them
    return environment.get_template("report.html").render(record=record, looks=look, scoring=scoring, **content)


def _content(record: Record, look: Looks) -> dict[str, Any]:
    """The content about the run."""
    return {
        "title": record.path.resolve().name,
        "facts": facts.run(record),
        "profiles": figures.weightings(record.manifest.weightings, look),
        "curves": _curves(record, look),
        "train": commands.train(record),
        "score": commands.score(record),
        "report": commands.report(record),
    }


def _scored(record: Record, scoring: Scoring | None, look: Looks) -> dict[str, Any]:
    """The content about its scorings."""
    quick = _quick(record, look)
    if scoring is None:
        return {"over_steps": [quick] if quick else [], "pictures": _pictures(record, [])}
    shown = [scoring, *answer.rivals(scoring, record.scorings)]
    found = answer.answer(scoring, shown[1:])
    alike = sorted((s for s in record.scorings if s.comparable(scoring)), key=lambda s: s.step)
    series = [(s.step, s.rows) for s in alike]
    curve = figures.distance(series, scoring.metric_name, f"{scoring.conditions}.", look, "over-steps")
    return {
        "answer": found,
        "tables": [_table(one, answer.differing(scoring, one) if one is not scoring else "") for one in shown],
        "differences": figures.differences(scoring, look),
        "over_steps": [drawing for drawing in (curve, quick) if drawing],
        "curve": curve,
        "sweep": _sweep(record, scoring),
        "pictures": _pictures(record, shown),
        "made": facts.made(scoring),
        "others": _others(record, scoring, shown),
        "exports": list(filter(None, (commands.export(record, scoring, name) for name in found.recommended[:1]))),
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


def _quick(record: Record, look: Looks) -> Drawing | None:
    """The quick scorings while training."""
    if not record.quick:
        return None
    evaluation, series = record.settings.evaluation, [(row.step, row.scores or ()) for row in record.quick]
    images, sampler, steps = (evaluation.get(key) for key in ("every_num_images", "sampler", "num_inference_steps"))
    label = f"{'FID' if series[-1][1][0].metric == 'fid' else 'FD'} while training"
    label += f" ({images:,} images)" if isinstance(images, int) else ""
    known = isinstance(sampler, str) and isinstance(steps, int)
    caption = f"Scored while training{f' (config.yaml: {sampler} in {steps} steps)' if known else ''}."
    return figures.distance(series, label, caption, look, "quick")


def _sweep(record: Record, scoring: Scoring) -> dict[str, Sequence[Any]]:
    """The plots of the newest scoring that has a sweep, `scoring` before all others, and the warnings of its rows."""
    look = looks(["sweep"])["sweep"]
    later = sorted((s for s in record.scorings if s is not scoring), key=lambda s: (s.step, s.finished), reverse=True)
    for source in (scoring, *later):
        note = _precision_note(source)
        drawings = [drawing for key in figures.WIDTHS for drawing in figures.sweep(source, key, look, note)]
        if drawings:
            texts = [f"{row.weights}: {text}" for row in source.sweep for text in row.warnings]
            return {"drawings": drawings, "warnings": [*answer.saturation(source, source.sweep), *texts]}
    return {"drawings": (), "warnings": ()}


def _pictures(record: Record, scorings: Sequence[Scoring]) -> list[tuple[str, str, str]]:
    """URI, title and text of the scorings' grids, then the first, middle and last grid of training, as far as the page's size allows.

    The picture says how a grid of training was sampled: the settings may have changed since, and previews take fewer steps.
    """
    wanted = [(s.grid, f"Scored at step {s.step:,}: {s.sampling}") for s in scorings if s.grid is not None]
    grids = record.sample_grids
    chosen = {0, len(grids) // 2, len(grids) - 1} if grids else set()
    wanted += [(grids[i][1], f"While training, step {grids[i][0]:,}") for i in sorted(chosen, reverse=True)]
    found, size = [], 0
    for path, title in wanted:
        if (read := picture(record, path)) is None:
            continue
        data, told = read
        size += len(data)
        if size > MAX_IMAGE_BYTES:
            record.problems.append(f"{path.relative_to(record.path)} was left out of this page: it would be too large")
            continue
        if path.parent.name == "samples" and told:
            title = f"While training: {told}"
        uri = "data:image/png;base64," + base64.b64encode(data).decode()
        alt = f"{title}. One labelled row of samples per weights, the same noise in every row"
        found.append((uri, title, alt))
    return found


def _curves(record: Record, look: Looks) -> list[Drawing]:
    rows = record.training
    found = [
        figures.curve(rows, "loss", "Training loss", "loss", "Mean over the steps since the previous row."),
        figures.quarters(rows, record.settings.num_train_timesteps),
        figures.distances(rows, look),
        figures.curve(rows, "grad_norm", "Gradient norm", "global norm", "Before clipping."),
        figures.curve(rows, "learning_rate", "Learning rate", "learning rate", "", linear=True),
        figures.curve(rows, "images_per_second", "Speed", "images/s", "Over all processes.", linear=True),
    ]
    if any(row.get("skipped_steps") for row in rows):
        caption = "Steps that mixed precision skipped because a gradient overflowed; they changed no average."
        found.append(figures.curve(rows, "skipped_steps", "Skipped steps", "steps", caption))
    return [drawing for drawing in found if drawing is not None]


def _others(record: Record, scoring: Scoring, shown: Sequence[Scoring]) -> list[tuple[str, str]]:
    """The scorings that the page does not show: differences in settings, recommendation, and the command that shows each."""
    rest = [s for s in record.scorings if s not in shown]
    found = []
    for other in sorted(rest, key=lambda s: (s.step, s.finished), reverse=True):
        differs = answer.differing(scoring, other)
        text = f"step {other.step:,}: {answer.judge(other).brief}; settings that differ: {differs}"
        found.append((text, commands.report(record, other)))
    return found


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


def _name_marker(record: Record) -> Callable[[str], Markup]:
    """A filter that sets the names of weights in a sentence in code type; everything is escaped first."""
    scored = (row.weights for scoring in record.scorings for row in (*scoring.rows, *scoring.sweep))
    names = sorted({*record.names, *scored}, key=len, reverse=True)
    pattern = re.compile(r"(?<![\w@&#-])(" + "|".join(re.escape(str(escape(name))) for name in names) + r")(?![\w@-])")

    def mark(text: str) -> Markup:
        return Markup(pattern.sub(r"<code>\1</code>", str(escape(text))))

    return mark
