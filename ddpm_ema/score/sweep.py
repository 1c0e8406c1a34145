"""Averages of other widths, reconstructed from snapshots and scored: the sweep, or a search for its best."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ddpm_ema.averaging import BiasCorrected, PowerFunction, Window
from ddpm_ema.averaging.profiles import Profile
from ddpm_ema.config import SweepSettings
from ddpm_ema.errors import UserError
from ddpm_ema.metrics import Estimate, difference
from ddpm_ema.named_weights import name_of
from ddpm_ema.score.driver import Jobs
from ddpm_ema.score.rows import Score, compare, ranked
from ddpm_ema.score.scorer import Scorer
from ddpm_ema.score.search import Search, ladder

IMAGES_PER_DIMENSION = 5
"""Of features: with fewer images a difference of two distances is biased (docs/scoring.md)."""


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
        groups, least = evaluation.groups, IMAGES_PER_DIMENSION * len(scorer.builder.frechet.mu)
        self.rungs = ladder(max(10 * groups, least, self.most_images // 8), self.most_images)
        if evaluation.sweep.search and self.most_images < least:
            raise UserError(
                f"evaluation.sweep.search: {self.most_images} images per candidate are fewer than {IMAGES_PER_DIMENSION} per "
                f"feature dimension ({least}), where a difference of distances is biased: raise evaluation.sweep.num_images"
            )

    def jobs(self, search: bool) -> Jobs[dict[str, Any]]:
        """Scores all candidates over as many images, or searches among them; returns what the search spent, by kind.

        Nothing is sampled that an earlier sweep, a search or a scoring by name has sampled already.
        """
        scorer = self.scorer
        if any(score.row["weights"] == "raw" for score in scorer.scores()):  # to be paired with it
            yield from scorer.sample(scorer.resolver.named("raw"), self.most_images)
        everything = dict.fromkeys(range(len(self.candidates)), self.most_images)
        looked_at = (yield from self._search()) if search else everything
        found = {}
        for place in everything:
            count = looked_at.get(place, 0)  # what a search did not look at is kept as well: it counts as a test
            before = scorer.record(self.weights[place]).candidate or {"num_images": 0}
            now = {"num_images": count, "looks": len(self.rungs) if search else 1}
            had = before["num_images"]
            found[place] = before if had > count or (search and had == count) else now
            if images := found[place]["num_images"]:
                yield from scorer.score(self.weights[place], images, named=False)
        for place, images in found.items():  # all at once: half a sweep is none
            candidate, record = self.candidates[place], scorer.record(self.weights[place])
            record.candidate = {**images, "kind": candidate.kind, "value": candidate.value}
            scorer.folder.keep(record)
        used, of = sum(looked_at.values()), sum(everything.values())
        return {self.candidates[0].kind: {"candidates": len(everything), "images": used, "of": of}} if search else {}

    def _search(self) -> Jobs[dict[int, int]]:
        """Candidate -> images, for those that a bracketing search looked at."""
        search = Search(len(self.candidates), self.rungs, self._estimate)
        for place, count in search:
            yield from self.scorer.sample(self.weights[place], count)
        return dict(sorted(search.counts.items()))

    def _estimate(self, place: int, count: int) -> Estimate:
        found = self.scorer.estimate(self.weights[place].key, count)
        assert found is not None
        return found


def summary(scorer: Scorer, spent: Mapping[str, Any]) -> dict[str, Any]:
    """What results.json says of this sweep and earlier ones, with the named weights in one table; {} where there was none.

    Candidates count whose weights are still what they were. `spent`: by the searches of this sweep, by kind.
    """
    (swept, unseen), named = _swept(scorer), scorer.scores()
    if not swept:
        return {}
    kinds = [score.row["sweep"] for score in swept]
    searches = {**scorer.folder.results().get("sweep_search", {}), **spent}
    searches = {kind: search for kind, search in searches.items() if kind in kinds}
    # Searches of earlier versions kept the number alone of what they did not look at.
    told = sum(max(0, search["candidates"] - kinds.count(kind)) for kind, search in searches.items())

    def pair(a: Score, b: Score) -> Estimate | None:
        """Over the images that both have; raw has those of every candidate."""
        count = min(sum(one.estimate.counts) for one in (a, b) if one.row["weights"] != "raw")
        ours, theirs = (scorer.estimate(one.row["weights_sha256"], count) for one in (a, b))
        return difference(ours, theirs) if ours is not None and theirs is not None else None

    rows, best = compare([*named, *swept], pair, max(unseen, told))
    found = {"rows": ranked(rows[: len(named)]), "sweep": rows[len(named) :], "may_be_best": best}
    return found | ({"sweep_search": searches} if searches else {})


def _swept(scorer: Scorer) -> tuple[list[Score], int]:
    """The candidates of all sweeps, by kind and width; and how many more no search looked at."""
    found, unseen = [], 0
    for record in scorer.folder.records():
        if (candidate := record.candidate) is None or scorer.weights_of(record) is None:
            continue
        if (score := record.score(candidate["num_images"])) is None:
            unseen += 1
            continue
        kind, value = candidate["kind"], candidate["value"]
        row = {**score.row, "weights": record.name, "sweep": kind, kind: value}
        found.append(Score(row, score.estimate, candidate["looks"]))
    found.sort(key=lambda score: score.row[score.row["sweep"]])
    return sorted(found, key=lambda score: score.row["sweep"], reverse=True), unseen


def describe(results: Mapping[str, Any]) -> str:
    """What the sweep found, for a terminal; empty where there was none."""
    lines = []
    for kind in dict.fromkeys(row["sweep"] for row in results.get("sweep", ())):
        rows = [row for row in results["sweep"] if row["sweep"] == kind]
        best = min(rows, key=lambda row: (-row["num_images"], row["frechet_distance_unbiased"]))
        lines.append(f"lowest {kind} of the sweep: {best[kind]:.6g} ({best['weights']}, {best['num_images']:,} images)")
        if best[kind] in (rows[0][kind], rows[-1][kind]):
            lines.append("  it lies at the end of the range: a wider range may hold a better one")
        if spent := results.get("sweep_search", {}).get(kind):
            share = f"{spent['images'] / spent['of']:.0%} of a full sweep's {spent['of']:,}"
            lines.append(f"  the search used {spent['images']:,} images, {share}")
    return "\n".join(lines)
