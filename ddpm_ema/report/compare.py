"""Scorings of one run, or several runs, side by side: what differs in their settings, and what each says."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from ddpm_ema.numbers import listed, with_error
from ddpm_ema.report import commands, facts, figures
from ddpm_ema.report.answer import LABELS, judge, newest
from ddpm_ema.report.gallery import Gallery, galleries
from ddpm_ema.report.plot import Look, Plot, Point, Series
from ddpm_ema.report.record import Record, Row, Scoring

ONLY_NETWORK = ("versions.", "model.", "diffusion.", "settings_digest")
"""Settings of a scoring in which two runs that are compared may differ: their distances mean the same."""


class Table(NamedTuple):
    """`head`: titles of the columns; each of `rows`: its title, then the cells. `commands`: whether the last cell is one."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    commands: bool = False


class Run(NamedTuple):
    """One of the runs that are compared, and the scoring that speaks for it. `name`: what tells it from the others."""

    name: str
    record: Record
    scoring: Scoring | None

    @property
    def best(self) -> Row | None:
        """The recommended weights, or those with the lowest distance."""
        rows = self.scoring.rows if self.scoring else ()
        wanted = judge(self.scoring).best if self.scoring else None
        return next((row for row in rows if row.weights == wanted), rows[0] if rows else None)


def chosen(records: Sequence[Record]) -> list[Run]:
    """The newest scoring of the first run, and of each other run the newest that was made like it, or else its newest."""
    names = [record.path.resolve().name for record in records]
    names = names if len(set(names)) == len(names) else [str(record.path) for record in records]
    first = newest(records[0].scorings)
    alike = [[s for s in record.scorings if first and not differing([_protocol(first), _protocol(s)])] for record in records]
    found = [first, *(newest(same) or newest(record.scorings) for record, same in zip(records[1:], alike[1:], strict=True))]
    return [Run(*fields) for fields in zip(names, records, found, strict=True)]


def _protocol(scoring: Scoring) -> dict[str, str]:
    """The settings that must agree if distances of different runs are to be compared."""
    return {key: value for key, value in scoring.settings.items() if not key.startswith(ONLY_NETWORK)}


def differing(settings: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    """Name of a setting -> its value in each, for settings that are not the same in all."""
    keys = dict.fromkeys(key for one in settings for key in one if key != "settings_digest")
    values = {key: [one.get(key, "none") for one in settings] for key in keys}
    return {LABELS.get(key, key.replace("_", " ")): found for key, found in values.items() if len(set(found)) > 1}


def scorings(record: Record, scoring: Scoring) -> Table | None:
    """All scorings of the run, this one first, then the newest: settings that differ, what each recommends, its own page."""
    others = sorted(record.scorings, key=lambda s: (s is scoring, s.step, s.finished), reverse=True)
    if len(others) < 2:
        return None
    differs = differing([one.settings for one in others])
    rows = []
    for i, one in enumerate(others):
        lowest = with_error(one.rows[0].distance, one.rows[0].stderr) if one.rows else "none"
        told = (judge(one).brief, f"{one.metric_name} {lowest}", commands.report(record, one))
        rows.append((f"step {one.step:,}", *(values[i][:100] for values in differs.values()), *told))
    head = ("Scoring", *differs, "Recommended", "Lowest distance", "Page of this scoring")
    return Table("Scorings of this run, the one on this page first, with all settings in which they differ", head, tuple(rows), True)


def runs(compared: Sequence[Run]) -> Table:
    """What each run says, then all settings of scoring and training in which the runs differ."""
    rows = [
        ("Recommended", *(judge(run.scoring).brief if run.scoring else "not scored" for run in compared)),
        ("Its distance", *(_distance(run, run.best) for run in compared)),
        ("Distance of raw", *(_distance(run, run.scoring and run.scoring.raw) for run in compared)),
        ("Trained", *(dict(facts.run(run.record)).get("Steps", "none") for run in compared)),
        ("Time", *(dict(facts.run(run.record)).get("Time", "not logged") for run in compared)),
        ("Scored step", *(f"{run.scoring.step:,}" if run.scoring else "none" for run in compared)),
    ]
    scored = [run.scoring.settings if run.scoring else {} for run in compared]
    rows += [(f"scoring: {key}", *values) for key, values in differing(scored).items()]
    rows += [(key, *values) for key, values in differing([run.record.settings.flat for run in compared]).items()]
    return Table("The runs, and all settings in which they differ", ("", *(run.name for run in compared)), tuple(rows))


def _distance(run: Run, row: Row | None) -> str:
    return f"{run.scoring.metric_name} {with_error(row.distance, row.stderr)}" if run.scoring and row else "not scored"


def sentence(compared: Sequence[Run]) -> str:
    """The run with the lowest distance, or why their distances cannot be compared."""
    scored = [run for run in compared if run.scoring is not None and run.best is not None]
    if len(scored) < 2:
        return "Fewer than two of these runs have been scored, so there is nothing to compare."
    if differs := differing([_protocol(run.scoring) for run in scored if run.scoring]):
        shown = listed([f"{key} ({', '.join(value[:12] for value in values)})" for key, values in differs.items()])
        return f"The distances of these runs cannot be compared, because they were scored with different settings: {shown}."
    first, second = sorted(scored, key=lambda run: run.best.distance if run.best else math.inf)[:2]
    assert first.scoring is not None and first.best is not None and second.best is not None
    error = math.hypot(first.best.stderr or 0.0, second.best.stderr or 0.0)
    gap = with_error(second.best.distance - first.best.distance, error)
    return (
        f"{first.scoring.conditions}: {first.best.weights} of {first.name} has the lowest {first.scoring.metric_name}, "
        f"{with_error(first.best.distance, first.best.stderr)}, {gap} below {second.best.weights} of {second.name}."
    )


def plots(scored: Sequence[Run], look: Mapping[str, Look]) -> Iterator[Plot | None]:
    """Distance of each run's best weights over training, and over the width of its sweep."""
    metric = scored[0].scoring.metric_name if scored and scored[0].scoring else ""
    over, widths = [], []
    for run in scored:
        assert run.scoring is not None and run.best is not None
        alike = [(one.step, one.rows) for one in run.record.scorings if one.comparable(run.scoring)]
        points = figures.by_weights(alike)
        over.append(Series(f"{run.name} {run.best.name}", look[run.name], points[run.best.name], "errors"))
        over.append(Series(f"{run.name} raw", look[run.name]._replace(dash="2 2"), points.get("raw", []), "errors"))
        rows = figures.swept(run.scoring, "std")
        points_of = [Point(row.get("std") or 0.0, row.distance, row.stderr or 0.0, f"{run.name} {row.weights}") for row in rows]
        widths += [Series(run.name, look[run.name], points_of, "band")] if len(rows) > 1 else []
    yield figures.over_training(over, f"{metric} over training", metric, "Bars are one standard error.")
    if len(widths) > 1:
        title, label, scale = figures.WIDTHS["std"]
        yield Plot(f"{metric} over {title}", label, metric, tuple(widths), "Bands are one and two standard errors.", scale)


def gallery(scored: Sequence[Run]) -> list[Gallery]:
    """The best and the raw weights of each run, at one place."""
    pictures = []
    for run in scored:
        assert run.scoring is not None and run.best is not None
        for grid in galleries(run.record, [run.scoring])[:1]:
            wanted = [one for one in grid.pictures if one.name in (run.best.weights, "raw")]
            pictures += [one._replace(name=f"{run.name} {one.name} ({run.scoring.sampling})") for one in wanted]
    return [Gallery("Samples of each run", tuple(pictures))] if pictures else []
