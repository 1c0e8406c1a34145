"""Averages of other widths, reconstructed from snapshots and scored: the sweep, or a search for its best."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ddpm_ema.averaging import BiasCorrected, PowerFunction
from ddpm_ema.averaging.profiles import Profile
from ddpm_ema.config import SweepSettings
from ddpm_ema.errors import UserError
from ddpm_ema.metrics import Difference, Estimate, difference
from ddpm_ema.named_weights import NamedWeights, name_of
from ddpm_ema.numbers import with_error
from ddpm_ema.score.folder import Record
from ddpm_ema.score.measure import Score, versus_raw
from ddpm_ema.score.scoring import Scoring
from ddpm_ema.score.search import Search
from ddpm_ema.score.together import on_main, only_on_main


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
    """What the settings ask for, every candidate resolved: one that cannot be reconstructed is an error now. A collective."""
    return [Run(scoring, wanted) for wanted in candidates(scoring.config.evaluation.sweep).values()]


def sweep(scoring: Scoring, runs: Iterable[Run], search: bool) -> dict[str, Any]:
    """Scores what `runs` ask for; on rank 0 the keys of results.json that tell of this sweep and earlier ones. A collective."""
    spent: dict[str, Any] = {}
    for run in runs:
        spent |= run.run(search)
    return only_on_main(scoring.processes, lambda: summary(scoring, spent)) or {}


class Run:
    """One sweep over candidates of one kind. `sources` are theirs, on rank 0."""

    def __init__(self, scoring: Scoring, wanted: list[Candidate]) -> None:
        self.scoring, self.candidates = scoring, wanted
        evaluation = scoring.config.evaluation
        self.most_images = evaluation.sweep.num_images or evaluation.num_images
        resolver = scoring.resolver
        found = only_on_main(scoring.processes, lambda: [resolver.reconstructed(c.profile) for c in wanted])
        self.sources: list[NamedWeights | None] = list(found) if found is not None else [None] * len(wanted)

    def run(self, search: bool) -> dict[str, Any]:
        """All candidates over as many images, or a search among them: what the search spent, by kind. A collective.

        Nothing is sampled that an earlier sweep, a search or a scoring by name has sampled already.
        """
        scoring, processes = self.scoring, self.scoring.processes
        self._extend_raw()
        looked_at = self._search() if search else dict.fromkeys(range(len(self.candidates)), self.most_images)
        counts = on_main(processes, lambda: self._at_least(looked_at))
        for place, count in counts.items():
            scoring.score_source(self.sources[place], count, named=False)
        on_main(processes, lambda: self._mark(counts))  # all at once: half a sweep is none
        if not search:
            return {}
        images, whole = sum(looked_at.values()), len(self.candidates) * self.most_images
        return {self.candidates[0].kind: {"candidates": len(self.candidates), "images": images, "of": whole}}

    def _extend_raw(self) -> None:
        """Samples raw up to the candidates' number of images, so that they are paired with it. A collective."""
        scoring = self.scoring
        if scoring.processes.broadcast(scoring.processes.is_main and _raw(scoring) is not None):
            raw = scoring.open("raw")
            scoring.sample(raw, scoring.label(raw), self.most_images)

    def _search(self) -> dict[int, int]:
        """Candidate -> images, for those that a bracketing search looked at. A collective."""
        scoring = self.scoring
        first = max(10 * scoring.config.evaluation.groups, self.most_images // 8)
        search = Search(len(self.candidates), first, self.most_images, self._estimate)
        while (wanted := on_main(scoring.processes, search.next)) is not None:
            source = self.sources[wanted[0]]
            scoring.sample(source, scoring.label(source), wanted[1])
        return scoring.processes.broadcast(dict(sorted(search.counts.items())))

    def _estimate(self, place: int, count: int) -> Estimate:
        source = self.sources[place]
        assert source is not None
        found = self.scoring.estimate(source.key, count)
        assert found is not None
        return found

    def _at_least(self, counts: Mapping[int, int]) -> dict[int, int]:
        """Rank 0: the most images that this or an earlier sweep gave each candidate."""
        return {
            place: max(count, (self._record(place).candidate or {}).get("num_images", 0))
            for place, count in counts.items()
        }

    def _mark(self, counts: Mapping[int, int]) -> None:
        """Rank 0: these weights are candidates from now on."""
        for place, count in counts.items():
            candidate, record = self.candidates[place], self._record(place)
            record.candidate = {"kind": candidate.kind, "value": candidate.value, "num_images": count}
            self.scoring.folder.keep(record)

    def _record(self, place: int) -> Record:
        return self.scoring.record(self.sources[place])


def summary(scoring: Scoring, spent: Mapping[str, Any]) -> dict[str, Any]:
    """Rank 0: `sweep` (rows, by kind and width), `sweep_best` and `sweep_search`, of every candidate that this sweep or an
    earlier one scored and whose weights are still what they were; {} where there is none."""
    found: dict[str, list[Swept]] = {}
    for record in scoring.folder.records():
        score = record.score(record.candidate["num_images"]) if record.candidate else None
        if score is not None and record.candidate is not None and scoring.source_of(record) is not None:
            found.setdefault(record.candidate["kind"], []).append(Swept(record.candidate["value"], record.name, score))
    raw = _raw(scoring)
    rows, best = [], {}
    for kind, entries in sorted(found.items(), reverse=True):
        entries.sort(key=lambda entry: entry.value)
        rows += [_row(scoring, kind, entry, raw) for entry in entries]
        best[kind] = _best(scoring, kind, entries)
    searches = {**scoring.folder.results().get("sweep_search", {}), **spent}
    searches = {kind: value for kind, value in searches.items() if kind in found}
    return ({"sweep": rows, "sweep_best": best} if rows else {}) | ({"sweep_search": searches} if searches else {})


@dataclass(frozen=True)
class Swept:
    """A candidate with its score."""

    value: float
    name: str
    score: Score

    @property
    def key(self) -> str:
        return str(self.score.row["weights_sha256"])

    @property
    def count(self) -> int:
        return sum(self.score.estimate.counts)


def _row(scoring: Scoring, kind: str, entry: Swept, raw: Score | None) -> dict[str, Any]:
    beside = scoring.estimate(str(raw.row["weights_sha256"]), entry.count) if raw is not None else None
    named = {**entry.score.row, "weights": entry.name, "sweep": kind, kind: entry.value}
    return {**named, **versus_raw(entry.score, beside)}


def _raw(scoring: Scoring) -> Score | None:
    """Rank 0: raw's score, where it was asked for."""
    return next((score for score in scoring.scores() if score.row["weights"] == "raw"), None)


def _best(scoring: Scoring, kind: str, entries: list[Swept]) -> dict[str, Any]:
    """The lowest distance among the candidates with the most images, unless one with fewer is significantly lower."""
    most = max(entry.count for entry in entries)
    best = min((entry for entry in entries if entry.count == most), key=lambda entry: entry.score.estimate.unbiased)
    for entry in entries:
        against = _compared(scoring, entry.key, entry.count, best)
        if against is not None and against.significant and against.delta < 0:
            best = entry
    close = []
    for entry in entries:
        against = _compared(scoring, entry.key, entry.count, best)
        if entry is not best and not (against is not None and against.significant and against.delta > 0):
            close.append(entry.name)
    kept = _versus_best_kept(scoring, best)
    return {"weights": best.name, kind: best.value, "not_significantly_worse": close, "versus_best_kept": kept}


def _compared(scoring: Scoring, key: str, count: int, best: Swept) -> Difference | None:
    """Some weights less the best candidate, over the images that both have; None where those are gone."""
    common = min(count, best.count)
    a, b = scoring.estimate(key, common), scoring.estimate(best.key, common)
    return difference(a, b) if a is not None and b is not None else None


def _versus_best_kept(scoring: Scoring, best: Swept) -> dict[str, Any] | None:
    """The best candidate less the best average that training kept, over the images that both have: nothing is sampled for it."""
    names = scoring.resolver.checkpoint.names[1:] if scoring.resolver.checkpoint else []
    kept = [score for score in scoring.scores() if score.row["weights"] in names]
    if not kept:
        return None
    row = min(kept, key=lambda score: score.estimate.unbiased).row
    found = _compared(scoring, row["weights_sha256"], row["num_images"], best)
    if found is None:
        return None
    low, high = (-end for end in reversed(found.interval95))
    return {
        "weights": row["weights"],
        "delta": -found.delta,
        "stderr": found.stderr,
        "interval": [low, high],
        "significant": found.significant,
    }


def describe(results: Mapping[str, Any]) -> str:
    """What the sweep found, for a terminal; empty where there was none."""
    lines = []
    for kind, best in results.get("sweep_best", {}).items():
        rows = [row for row in results["sweep"] if row["sweep"] == kind]
        images = next(row["num_images"] for row in rows if row["weights"] == best["weights"])
        close = best["not_significantly_worse"]
        tail = f"; not significantly worse: {', '.join(close)}" if close else ""
        lines.append(f"best {kind} of the sweep: {best[kind]:.6g} ({best['weights']}, {images:,} images){tail}")
        if best[kind] in (rows[0][kind], rows[-1][kind]):
            lines.append("  it lies at the end of the range: a wider range may hold a better one")
        if kept := best["versus_best_kept"]:
            size, side = with_error(abs(kept["delta"]), kept["stderr"]), "below" if kept["delta"] < 0 else "above"
            verdict = "significant" if kept["significant"] else "not significant"
            lines.append(f"  {size} {side} {kept['weights']}, the best average that training kept: {verdict}")
        if spent := results.get("sweep_search", {}).get(kind):
            lines.append(f"  the search looked at {spent['images']:,} images, a full sweep would at {spent['of']:,}")
    return "\n".join(lines)
