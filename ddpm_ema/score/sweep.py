"""Averages of other widths, reconstructed from snapshots and scored: the sweep, or a search for its best."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ddpm_ema.averaging import BiasCorrected, PowerFunction
from ddpm_ema.averaging.profiles import Profile
from ddpm_ema.config import SweepSettings, digest
from ddpm_ema.errors import UserError
from ddpm_ema.metrics import difference
from ddpm_ema.named_weights import NamedWeights, name_of
from ddpm_ema.score.measure import Score, versus_raw
from ddpm_ema.score.scoring import Scoring
from ddpm_ema.score.search import Search
from ddpm_ema.score.together import on_main, only_on_main

KEYS = ("sweep", "sweep_best", "sweep_search", "sweep_digest")


@dataclass(frozen=True)
class Candidate:
    """One width: `kind` is `std` (a power function's) or `decay` (a debiased constant one)."""

    kind: str
    value: float
    name: str
    profile: Profile


def candidates(settings: SweepSettings) -> dict[str, list[Candidate]]:
    """kind -> candidates in order of width. Raises UserError for a range that cannot be."""
    found = {}
    if settings.stds is not None:
        first, last, count = _range("stds", settings.stds)
        found["std"] = [_candidate("std", float(value)) for value in np.linspace(first, last, count)]
    if settings.decays is not None:
        first, last, count = _range("decays", settings.decays)
        if not (0 < first < 1 and 0 < last < 1):
            raise UserError(f"evaluation.sweep.decays: {settings.decays}: decays lie between 0 and 1")
        rests = np.geomspace(1 - first, 1 - last, count)  # evenly spaced in log(1 - decay)
        found["decay"] = [_candidate("decay", float(1 - rest)) for rest in rests]
    return found


def _range(field: str, text: str) -> tuple[float, float, int]:
    try:
        first, last, count = text.split(":")
        values = float(first), float(last), int(count)
    except ValueError:
        raise UserError(f"evaluation.sweep.{field}: {text!r} is not first:last:count") from None
    if values[2] < 2 or values[0] == values[1]:
        raise UserError(f"evaluation.sweep.{field}: {text!r}: give two different ends and a count of at least 2")
    return values


def _candidate(kind: str, value: float) -> Candidate:
    value = float(f"{value:.6g}")
    try:
        profile: Profile = PowerFunction(std=value) if kind == "std" else BiasCorrected(decay=value)
    except ValueError as error:
        raise UserError(f"evaluation.sweep.{kind}s: {error}") from None
    return Candidate(kind, value, name_of(profile), profile)


def prepare(scoring: Scoring) -> list[Run]:
    """What the settings ask for, every candidate resolved: one that cannot be had is an error now. A collective."""
    return [Run(scoring, kind, wanted) for kind, wanted in candidates(scoring.config.evaluation.sweep).items()]


def sweep(runs: Iterable[Run], search: bool) -> dict[str, Any]:
    """The keys of results.json that tell of the sweep: `sweep` (rows), `sweep_best`, `sweep_digest` and, of a search,
    `sweep_search`, on rank 0. A collective; what is done already is taken from results.json."""
    found: dict[str, Any] = {}
    for run in runs:
        for key, value in run.run(search).items():
            found[key] = [*found.get(key, []), *value] if isinstance(value, list) else {**found.get(key, {}), **value}
    return found


class Run:
    """One sweep over candidates of one kind. `sources` are theirs, on rank 0."""

    def __init__(self, scoring: Scoring, kind: str, wanted: list[Candidate]) -> None:
        self.scoring, self.kind, self.candidates = scoring, kind, wanted
        evaluation = scoring.config.evaluation
        self.most_images = evaluation.sweep.num_images or evaluation.num_images
        found = only_on_main(scoring.processes, lambda: [self._source(candidate) for candidate in wanted])
        self.sources: list[NamedWeights | None] = list(found) if found is not None else [None] * len(wanted)

    def _source(self, candidate: Candidate) -> NamedWeights:
        """Its key tells it from a copy of the same name scored over another number of images."""
        source = self.scoring.resolver.reconstructed(candidate.profile)
        return replace(source, key=digest([source.key, self.most_images]))

    def run(self, search: bool) -> dict[str, Any]:
        """All candidates, or a search among them, unless results.json has it. A collective."""
        identity = digest([self.kind, search, [source.key for source in self.sources if source]])
        processes, folder = self.scoring.processes, self.scoring.folder
        done = only_on_main(processes, lambda: _done(folder.results(), self.kind, identity))
        if processes.broadcast(done is not None):
            return done or {}
        self._extend_raw()
        part = self.search() if search else self.all()
        return {**part, "sweep_digest": {self.kind: identity}} if processes.is_main else {}

    def _extend_raw(self) -> None:
        """Samples raw up to the candidates' number of images, so that they are paired with it. A collective."""
        scoring = self.scoring
        has_raw = scoring.processes.is_main and scoring.raw_score(scoring.config.evaluation.num_images) is not None
        if scoring.processes.broadcast(has_raw):
            raw = scoring.open("raw")
            scoring.sample(raw, scoring.label(raw), self.most_images)

    def all(self) -> dict[str, Any]:
        """Every candidate over the same number of images. A collective."""
        for place in range(len(self.candidates)):
            self.score(place, self.most_images)
        return self.summary(range(len(self.candidates)), _is_significant)

    def score(self, place: int, count: int, keep_features: bool = False) -> None:
        candidate = self.candidates[place]
        more = {"sweep": candidate.kind, candidate.kind: candidate.value}
        self.scoring.score_source(self.sources[place], count, more, keep_features)

    def search(self) -> dict[str, Any]:
        """The best one, by a bracketing search. A collective."""
        scoring = self.scoring
        groups = scoring.config.evaluation.groups
        first = max(10 * groups, self.most_images // 8)
        search = Search(len(self.candidates), first, self.most_images, self._estimate)
        while (wanted := on_main(scoring.processes, search.next)) is not None:
            source = self.sources[wanted[0]]
            scoring.sample(source, scoring.label(source), wanted[1])
        counts = scoring.processes.broadcast(search.counts)
        for place, count in counts.items():
            self.score(place, count, keep_features=True)  # until results.json has the sweep
        if not scoring.processes.is_main:
            return {}
        worse = {self.candidates[c].name for c in counts if search.is_significant(c)}
        part = self.summary(sorted(counts), lambda score, _: score.row["weights"] in worse)
        spent, whole = sum(counts.values()), len(self.candidates) * self.most_images
        part["sweep_search"] = {self.kind: {"candidates": len(self.candidates), "images": spent, "of": whole}}
        return part

    def _estimate(self, place: int, count: int) -> Any:
        source, measure = self.sources[place], self.scoring.measure
        assert source is not None
        assert measure is not None
        return measure.estimate(self.scoring.store(source.slug).block().first(count), source.name)

    def summary(self, places: Iterable[int], is_significant: Callable[[Score, Score], bool]) -> dict[str, Any]:
        """Rank 0: rows in order of width, which is best, and which are not significantly worse. {} elsewhere."""
        if not self.scoring.processes.is_main:
            return {}
        scores = [score for place in places if (score := self._finished(place)) is not None]
        raws: dict[int, Score | None] = {}
        rows = []
        for score in scores:
            count = sum(score.estimate.counts)
            if count not in raws:
                raws[count] = self.scoring.raw_score(count)
            rows.append({**score.row, **versus_raw(score, raws[count])})
        best = min(scores, key=lambda score: score.estimate.unbiased)
        close = [score.row["weights"] for score in scores if score is not best and not is_significant(score, best)]
        summary = {"weights": best.row["weights"], self.kind: best.row[self.kind], "not_significantly_worse": close}
        return {"sweep": rows, "sweep_best": {self.kind: summary}}

    def _finished(self, place: int) -> Score | None:
        source = self.sources[place]
        return self.scoring.folder.finished(source.slug) if source else None


def _is_significant(score: Score, best: Score) -> bool:
    return difference(score.estimate, best.estimate).significant


def _done(results: Mapping[str, Any], kind: str, identity: str) -> dict[str, Any] | None:
    """What results.json has of this very sweep."""
    if results.get("sweep_digest", {}).get(kind) != identity:
        return None
    rows = [row for row in results["sweep"] if row.get("sweep") == kind]
    parts = {key: {kind: results[key][kind]} for key in KEYS[1:] if kind in results.get(key, {})}
    return {"sweep": rows, **parts}


def describe(results: Mapping[str, Any]) -> str:
    """What the sweep found, for a terminal; empty where there was none."""
    lines = []
    for kind, best in results.get("sweep_best", {}).items():
        close = best["not_significantly_worse"]
        tail = f"; not significantly worse: {', '.join(close)}" if close else ""
        lines.append(f"best {kind} of the sweep: {best[kind]:.6g} ({best['weights']}){tail}")
        if spent := results.get("sweep_search", {}).get(kind):
            lines.append(f"  the search sampled {spent['images']:,} images, a full sweep would {spent['of']:,}")
    return "\n".join(lines)
