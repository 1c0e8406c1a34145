"""Scorings of one run, or several runs, side by side: in which settings they differ, and what each says."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import yaml

from ddpm_ema.numbers import decimals, figure, listed, verdict_of, with_error
from ddpm_ema.report import commands, facts, figures
from ddpm_ema.report.answer import LABELS, Answer, answer, judge, newest, rivals
from ddpm_ema.report.gallery import Gallery, galleries
from ddpm_ema.report.plot import Look, Plot, Series
from ddpm_ema.report.record import Record, Row, Scoring, differences, flat

OF_THE_NETWORK = ("versions.", "model.", "diffusion.", "settings_digest")
"""Settings of a scoring in which compared runs may differ: their distances mean the same."""


class Table(NamedTuple):
    """`head`: titles of the columns; each of `rows`: its title, then the cells. `commands`: whether the last cell is one."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    commands: bool = False


@dataclass(frozen=True)
class Run:
    """One of the runs that are compared, under a name of its own, and the scoring that speaks for it."""

    name: str
    record: Record
    scoring: Scoring | None

    @cached_property
    def answer(self) -> Answer | None:
        """As on the run's own page."""
        return answer(self.scoring, rivals(self.scoring, self.record.scorings)) if self.scoring else None

    @cached_property
    def best(self) -> Row | None:
        """The recommended weights, or those with the lowest distance."""
        if self.scoring is None or self.answer is None:
            return None
        return next((row for row in self.scoring.entries if row.weights == self.answer.best), self.scoring.rows[0])


def chosen(records: Sequence[Record]) -> list[Run]:
    """Each run with its newest scoring, if possible of one protocol that all of them were scored by."""
    names = [record.path.resolve().name for record in records]
    names = names if len(set(names)) == len(names) else [str(record.path) for record in records]
    for first in sorted(records[0].scorings, key=lambda s: (s.compares_with_raw, s.step, s.finished), reverse=True):
        alike = [newest([s for s in record.scorings if _protocol(s) == _protocol(first)]) for record in records]
        if None not in alike:
            return list(map(Run, names, records, alike))
    return [Run(name, record, newest(record.scorings)) for name, record in zip(names, records, strict=True)]


def _protocol(scoring: Scoring) -> dict[str, str]:
    """The settings that must agree if distances of different runs are to be compared."""
    return {key: value for key, value in scoring.settings.items() if not key.startswith(OF_THE_NETWORK)}


def differing(settings: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    """Name of a setting -> its value in each, for settings that are not the same in all."""
    return {LABELS.get(key, key): values for key, values in differences(settings).items()}


def scorings(record: Record, scoring: Scoring) -> Table | None:
    """All scorings of the run, this one first, then the newest."""
    found = sorted(record.scorings, key=lambda s: (s is scoring, s.step, s.finished), reverse=True)
    differs = differing([one.settings for one in found])
    # What the reference says of its extractor is the extractor's.
    told_once = {tuple(values): key for key, values in reversed(differs.items())}
    differs = {key: values for key, values in differs.items() if told_once[tuple(values)] == key}
    rows = []
    for i, one in enumerate(found):
        lowest = _distance(one, one.entries[0] if one.entries else None)
        told = (judge(one).brief, lowest, commands.report(record, scoring=one))
        rows.append((f"step {one.step:,}", *(values[i] for values in differs.values()), *told))
    head = ("Scoring", *differs, "Recommended", "Lowest distance", "Page of this scoring")
    caption = "The one on this page first, with all settings in which they differ"
    return Table(caption, head, tuple(rows), commands=True) if len(found) > 1 else None


def runs(compared: Sequence[Run]) -> Table:
    """What each run says, then all settings of scoring and training in which the runs differ."""
    told = [
        {
            "Recommended": run.answer.brief if run.answer else "not scored",
            "Its distance": _distance(run.scoring, run.best),
            "Distance of raw": _distance(run.scoring, run.scoring.raw if run.scoring else None),
            "Scored step": f"{run.scoring.step:,}" if run.scoring else "none",
            **{key: value for key, value in facts.run(run.record) if key in ("Steps", "Time")},
        }
        for run in compared
    ]
    rows = [(key, *(one.get(key, "") for one in told)) for key in dict.fromkeys(key for one in told for key in one)]
    scored = [run.scoring.settings if run.scoring else {} for run in compared]
    for settings in (scored, list(map(_trained, compared))):
        rows += [row for key, values in differing(settings).items() if (row := (key, *values)) not in rows]
    return Table("The runs, and all settings in which they differ", ("", *(run.name for run in compared)), tuple(rows))


def seeds(compared: Sequence[Run]) -> Table | None:
    """What runs that differ in their training seed alone say together of one step; None for others."""
    scored = [run.scoring for run in compared if run.scoring is not None and run.scoring.raw is not None]
    differs = differing(list(map(_trained, compared)))
    if len(scored) < len(compared) or list(differs) != ["training seed"]:
        return None
    own_seeds = len(set(differs["training seed"])) == len(compared)  # a copy of a run is no further seed
    if not own_seeds or differing(list(map(_protocol, scored))) or len({scoring.step for scoring in scored}) > 1:
        return None
    from ddpm_ema.metrics.across_runs import across_runs  # loads torch, which no other page needs
    from ddpm_ema.metrics.jackknife import Estimate

    try:
        found = across_runs([{row.weights: Estimate.from_dict(row.estimate) for row in s.rows} for s in scored])
    except (LookupError, TypeError, ValueError, ArithmeticError):  # of an older version, or no file of ours
        told = "its seeds were not read together, because a table lacks estimates: score the runs again, which keeps the images"
        compared[0].record.problems.append(told)
        return None
    rows = []
    for name, one in sorted(found.items(), key=lambda item: item[1].distance.mean):
        gap, size = one.difference, with_error(one.distance.mean, one.distance.stderr)
        verdict = "" if gap is None else verdict_of(gap.mean, bool(one.holds))
        delta = "" if gap is None else with_error(gap.mean, gap.stderr, signed=True)
        rows.append((name, verdict, delta, size, figure(one.distance.training_std, decimals(one.distance.stderr))))
    caption = (
        f"Means over {len(compared)} training seeds, \N{PLUS-MINUS SIGN} one standard error of the mean, which covers other seeds "
        "and other noise. Better and worse hold over seeds (Student's t, corrected for the number of averages by Holm). What a seed "
        "adds is a standard deviation, without the part of sampling"
    )
    head = ("Weights", "Over seeds", "Difference from raw", scored[0].metric_name, "What a seed adds")
    return Table(caption, head, tuple(rows))


def _distance(scoring: Scoring | None, row: Row | None) -> str:
    return f"{scoring.metric_name} {with_error(row.distance, row.stderr)}" if scoring and row else "none"


def _trained(run: Run) -> dict[str, str]:
    """The run's config.yaml by dotted key, without the place."""
    found = dict(flat(yaml.safe_load(run.record.config_text or "{}")))
    return {"training seed" if key == "seed" else key: value for key, value in found.items() if key != "output_dir"}


def sentence(compared: Sequence[Run], together: Table | None) -> str:
    """What `seeds` says; else which run's `best` is the lowest, or why their distances cannot be compared."""
    if together is not None:
        by_word = {word: [row[0] for row in together.rows if row[1] == word] for word in ("better", "worse")}
        told = [
            f"{listed(names)} {'is' if len(names) == 1 else 'are'} {word} than raw"
            for word, names in by_word.items()
            if names
        ]
        return f"Over {len(compared)} training seeds: {listed(told) or 'no average is shown to be better or worse than raw'}."
    scored = [(run, run.scoring, run.best) for run in compared]
    known = [
        (row.distance, run, scoring, row) for run, scoring, row in scored if scoring is not None and row is not None
    ]
    if len(known) < 2:
        return "Fewer than two of these runs have been scored, so there is nothing to compare."
    if differs := differing([_protocol(scoring) for _, _, scoring, _ in known]):
        shown = listed([f"{key} ({', '.join(value[:12] for value in values)})" for key, values in differs.items()])
        return f"The distances of these runs cannot be compared, because they were scored with different settings: {shown}."
    (_, run, scoring, row), (_, other, _, behind) = sorted(known, key=lambda one: one[0])[:2]
    gap, error = behind.distance - row.distance, math.hypot(row.stderr or 0.0, behind.stderr or 0.0)
    return (
        f"{scoring.conditions}: of one set of weights per run, {row.weights} of {run.name} has the lowest {scoring.metric_name}, "
        f"{with_error(row.distance, row.stderr)}. That is {with_error(gap, error)} below {behind.weights} of {other.name}, "
        f"{'more' if gap > 2 * error else 'less'} than two standard errors."
    )


def plots(compared: Sequence[Run], looks: Mapping[str, Look]) -> Iterator[Plot | None]:
    """Distance of each run's best and raw weights over training, and over the width of its sweep."""
    over, widths, metric = [], [], ""
    if differing([_protocol(run.scoring) for run in compared if run.scoring]):
        return  # on one axis they would be compared
    for run in compared:
        name, scoring, best = run.name, run.scoring, run.best
        if scoring is None or best is None:
            continue
        metric = scoring.metric_name
        points = figures.by_weights((one.step, one.rows) for one in run.record.scorings if one.comparable(scoring))
        for weights, dash in {"raw": "2 2", best.name: ""}.items():
            over.append(Series(f"{name} {weights}", looks[name]._replace(dash=dash), points.get(weights, []), "errors"))
        swept = figures.swept(scoring, "std", prefix=f"{name} ")
        widths += [Series(name, looks[name], swept, "band")] if len(swept) > 1 else []
    yield figures.over_training(over, f"{metric} over training", metric, "Bars are one standard error.")
    if widths:
        title, label = figures.WIDTHS["std"]
        yield Plot(f"{metric} over {title}", label, metric, tuple(widths), "Bands are one and two standard errors.")


def gallery(compared: Sequence[Run]) -> list[Gallery]:
    """The best and the raw weights of each run, at one place."""
    pictures = []
    for run in compared:
        for grid in galleries(run.record, [run.scoring])[:1] if run.scoring and run.best else ():
            wanted = [one for one in grid.pictures if run.best and one.name in (run.best.weights, "raw")]
            pictures += [one._replace(name=f"{run.name} {one.name}") for one in wanted]
    title = "Samples of each run, from the same noise where the seed is the same"
    return [Gallery(title, tuple(pictures))] if pictures else []
