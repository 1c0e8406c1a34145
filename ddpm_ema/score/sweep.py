"""Averages of other widths, reconstructed from snapshots and scored: the sweep, or a search for its best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ddpm_ema.averaging import BiasCorrected, PowerFunction, Window
from ddpm_ema.averaging.profiles import Profile
from ddpm_ema.config import SweepSettings
from ddpm_ema.errors import UserError
from ddpm_ema.metrics import Difference, Estimate, difference
from ddpm_ema.named_weights import name_of
from ddpm_ema.numbers import with_error
from ddpm_ema.score.driver import Jobs
from ddpm_ema.score.rows import Score, paired, versus_raw
from ddpm_ema.score.scorer import Scorer
from ddpm_ema.score.search import Search


@dataclass(frozen=True)
class Candidate:
    """One width: `kind` is `std` (a power function's), `decay` (a debiased constant one) or `cooldown` (steps of a linear decay
    of the learning rate that the mean of the last steps emulates)."""

    kind: str
    value: float
    name: str
    profile: Profile


def candidates(settings: SweepSettings, step: int | None = None) -> dict[str, list[Candidate]]:
    """kind -> candidates in order of width, of a checkpoint at `step` (None: of a long one). Raises UserError for a range that
    cannot be."""
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
    if settings.cooldowns is not None:
        first, last, count = _range("cooldowns", settings.cooldowns)
        lengths = dict.fromkeys(round(length) for length in np.linspace(first, last, count))  # whole steps, each once
        end = max(lengths) if step is None else step
        found["cooldown"] = [_candidate("cooldown", length, end) for length in lengths]
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


def _candidate(kind: str, value: float, end: int = 0) -> Candidate:
    value = value if kind == "cooldown" else float(f"{value:.6g}")
    try:
        match kind:
            case "std":
                profile: Profile = PowerFunction(std=value)
            case "decay":
                profile = BiasCorrected(decay=value)
            case _:
                profile = Window(length=int(value), end=end)
    except ValueError as error:
        raise UserError(f"evaluation.sweep.{kind}s: {error}") from None
    return Candidate(kind, value, name_of(profile), profile)


class Sweep:
    """One sweep over candidates of one kind. All are resolved first: one that cannot be reconstructed is an error at once."""

    def __init__(self, scorer: Scorer, wanted: list[Candidate]) -> None:
        self.scorer, self.candidates = scorer, wanted
        evaluation = scorer.config.evaluation
        self.most_images = evaluation.sweep.num_images or evaluation.num_images
        self.weights = [scorer.resolver.reconstructed(candidate.profile) for candidate in wanted]

    def jobs(self, search: bool) -> Jobs[dict[str, Any]]:
        """Scores all candidates over as many images, or searches among them; returns what the search spent, by kind.

        Nothing is sampled that an earlier sweep, a search or a scoring by name has sampled already.
        """
        scorer = self.scorer
        if scorer.raw() is not None:  # to be paired with it
            yield from scorer.sample(scorer.resolver.named("raw"), self.most_images)
        everything = dict.fromkeys(range(len(self.candidates)), self.most_images)
        looked_at = (yield from self._search()) if search else everything
        counts = {place: max(count, self._swept_before(place)) for place, count in looked_at.items()}
        for place, count in counts.items():
            yield from scorer.score(self.weights[place], count, named=False)
        for place, count in counts.items():  # all at once: half a sweep is none
            candidate, record = self.candidates[place], scorer.record(self.weights[place])
            record.candidate = {"kind": candidate.kind, "value": candidate.value, "num_images": count}
            scorer.folder.keep(record)
        spent = {
            "candidates": len(self.candidates),
            "images": sum(looked_at.values()),
            "of": sum(everything.values()),
        }
        return {self.candidates[0].kind: spent} if search else {}

    def _search(self) -> Jobs[dict[int, int]]:
        """Candidate -> images, for those that a bracketing search looked at."""
        first = max(10 * self.scorer.config.evaluation.groups, self.most_images // 8)
        search = Search(len(self.candidates), first, self.most_images, self._estimate)
        for place, count in search:
            yield from self.scorer.sample(self.weights[place], count)
        return dict(sorted(search.counts.items()))

    def _estimate(self, place: int, count: int) -> Estimate:
        found = self.scorer.estimate(self.weights[place].key, count)
        assert found is not None
        return found

    def _swept_before(self, place: int) -> int:
        """The images that an earlier sweep gave a candidate."""
        return int((self.scorer.record(self.weights[place]).candidate or {}).get("num_images", 0))


def summary(scorer: Scorer, spent: Mapping[str, Any]) -> dict[str, Any]:
    """What results.json says of this sweep and earlier ones; {} where there was none.

    Args:
        scorer: whose folder holds the candidates; those count whose weights are still what they were.
        spent: what the searches of this sweep spent, by kind.

    Returns:
        `sweep` (rows, by kind and width), `sweep_best` and `sweep_search`.
    """
    found: dict[str, list[Swept]] = {}
    for record in scorer.folder.records():
        score = record.score(record.candidate["num_images"]) if record.candidate else None
        if score is not None and record.candidate is not None and scorer.weights_of(record) is not None:
            found.setdefault(record.candidate["kind"], []).append(Swept(record.candidate["value"], record.name, score))
    raw = scorer.raw()
    rows, best = [], {}
    for kind, entries in sorted(found.items(), reverse=True):
        entries.sort(key=lambda entry: entry.value)
        rows += [_row(scorer, kind, entry, raw) for entry in entries]
        best[kind] = _best(scorer, kind, entries)
    searches = {**scorer.folder.results().get("sweep_search", {}), **spent}
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


def _row(scorer: Scorer, kind: str, entry: Swept, raw: Score | None) -> dict[str, Any]:
    beside = scorer.estimate(str(raw.row["weights_sha256"]), entry.count) if raw is not None else None
    named = {**entry.score.row, "weights": entry.name, "sweep": kind, kind: entry.value}
    return {**named, **versus_raw(entry.score, beside)}


def _best(scorer: Scorer, kind: str, entries: list[Swept]) -> dict[str, Any]:
    """The lowest distance among the candidates with the most images, unless one with fewer is significantly lower."""
    most = max(entry.count for entry in entries)
    best = min((entry for entry in entries if entry.count == most), key=lambda entry: entry.score.estimate.unbiased)
    for entry in entries:
        against = _compared(scorer, entry.key, entry.count, best)
        if against is not None and against.significant and against.delta < 0:
            best = entry
    close = []
    for entry in entries:
        against = _compared(scorer, entry.key, entry.count, best)
        if entry is not best and not (against is not None and against.significant and against.delta > 0):
            close.append(entry.name)
    kept = _versus_best_kept(scorer, best)
    return {"weights": best.name, kind: best.value, "not_significantly_worse": close, "versus_best_kept": kept}


def _compared(scorer: Scorer, key: str, count: int, best: Swept) -> Difference | None:
    """Some weights less the best candidate, over the images that both have; None where those are gone."""
    common = min(count, best.count)
    a, b = scorer.estimate(key, common), scorer.estimate(best.key, common)
    return difference(a, b) if a is not None and b is not None else None


def _versus_best_kept(scorer: Scorer, best: Swept) -> dict[str, Any] | None:
    """The best candidate less the best average that training kept, over the images that both have: nothing is sampled for it."""
    names = scorer.resolver.checkpoint.names[1:] if scorer.resolver.checkpoint else []
    kept = [score for score in scorer.scores() if score.row["weights"] in names]
    if not kept:
        return None
    row = min(kept, key=lambda score: score.estimate.unbiased).row
    common = min(row["num_images"], best.count)
    ours, theirs = scorer.estimate(best.key, common), scorer.estimate(row["weights_sha256"], common)
    if ours is None or theirs is None:
        return None
    return {"weights": row["weights"], **paired(difference(ours, theirs))}


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
