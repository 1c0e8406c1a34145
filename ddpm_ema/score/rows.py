"""Features of one set of weights → its row of results.json: distance with error bars, KID, precision, recall."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ddpm_ema import metrics
from ddpm_ema.config import EvaluationSettings
from ddpm_ema.features import full_precision
from ddpm_ema.metrics import Estimate, FrechetReference, KernelReference, Reference, Verdict
from ddpm_ema.score.feature_store import FeatureBatch

NEIGHBOURS_NEEDED = 5  # three neighbours beside the image itself, when one of at least ten groups is left out
FLAT_CONTRAST = 4  # levels of 255: an image whose values all lie so close together is of one colour to the eye
ALIKE_VARIANCE = 0.01  # of the reference's: samples whose features vary less are nearly all alike


@dataclass(frozen=True)
class Score:
    """Figures of one set of weights: `row` as in results.json, and the `estimate` that pairs it with others.

    The row's `measures` pair it, too, and are not of results.json. `looks`: at how many numbers of images a search may have
    tested them; 1 where there was none.
    """

    row: dict[str, Any]
    estimate: Estimate
    looks: int = 1


class RowBuilder:
    """Compares features with one reference, on `device`; `population`: with what the reference's images are a sample of."""

    def __init__(
        self, reference: Reference, settings: EvaluationSettings, device: torch.device, population: bool = False
    ) -> None:
        self.reference, self.settings, self.device = reference, settings, device
        self.frechet = FrechetReference(reference.statistics, device)
        self.sampled_from = reference.features if population else None
        self.kernel: KernelReference | None = None  # made when first needed: a search needs none

    def estimate(self, batch: FeatureBatch, name: str) -> Estimate:
        """The Fréchet distance with its error, alone: what a search needs."""
        more: dict[str, Any] = {"sampled_from": self.sampled_from, "name": name}
        return metrics.estimate_distance(batch.features, batch.indices, self.settings.groups, self.frechet, **more)

    def build(self, batch: FeatureBatch, name: str, more: Mapping[str, Any]) -> Score:
        """All figures. `more` goes into the row (profile, warnings, what a sweep says of a candidate)."""
        last = time.perf_counter()
        estimate, measures = self.estimate(batch, name), dict[str, Estimate]()
        seconds = {"sampling": batch.sampling_seconds, "features": batch.seconds}
        seconds["distance"] = time.perf_counter() - last
        with full_precision(self.device):  # also beside a training that allows TF32
            last = time.perf_counter()
            for key, measures[key] in self._measures(batch):
                now = time.perf_counter()
                seconds[key], last = now - last, now
        row: dict[str, Any] = {
            "weights": name,
            **more,
            "num_images": len(batch),
            "frechet_distance": estimate.plain,
            "frechet_distance_unbiased": estimate.unbiased,
            "stderr": estimate.stderr,
            "interval95": list(estimate.interval()),
            "saturated": float(batch.saturated.double().mean()),
            "measures": {key: found.to_dict() for key, found in measures.items()},
        }
        for key, found in measures.items():
            row |= {key: found.plain, f"{key}_stderr": found.stderr}
        row["warnings"] = [*more.get("warnings", ()), *estimate.warnings, *self._doubts(batch)]
        row |= {"seconds": sum(seconds.values()), "seconds_of": seconds}
        return Score(row, estimate)

    def _doubts(self, batch: FeatureBatch) -> Iterator[str]:
        """Warnings about samples that look like no image of the reference, whatever their distance."""
        flat = float((batch.contrast <= FLAT_CONTRAST).double().mean())
        if flat > 0.5:
            yield f"{flat:.0%} of these samples are of one colour: the network has learned nothing, or has broken"
        variance, wanted = float(batch.features.var(dim=0).double().sum()), self.frechet.trace
        if variance < ALIKE_VARIANCE * wanted:
            yield f"these samples are nearly all alike: features have {variance / wanted:.2%} of the reference's variance"

    def _measures(self, batch: FeatureBatch) -> Iterator[tuple[str, Estimate]]:
        """What else compares the samples with the reference's images, where these are at hand."""
        reference, radii = self.reference.features, self.reference.radii
        if reference is None:
            return
        features, reference = batch.features.to(self.device), reference.to(self.device)
        membership = batch.indices % self.settings.groups
        if self.kernel is None:
            self.kernel = KernelReference(reference, self.settings.groups, self.sampled_from is not None)
        yield "kid", self.kernel.estimate(features, membership)
        if radii is not None and self.settings.precision_recall and len(batch) >= NEIGHBOURS_NEEDED:
            yield "precision", metrics.precision(features, membership, reference, radii)
            yield "recall", metrics.recall(features, membership, reference)


def paired(a: Score, b: Score) -> Estimate | None:
    """a − b; None where they are not of the same images."""
    return metrics.difference(a.estimate, b.estimate) if a.estimate.counts == b.estimate.counts else None


def compare(
    scores: Sequence[Score], pair: Callable[[Score, Score], Estimate | None] = paired, unseen: int = 0
) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of one table with their differences from raw, and the names that may be the best of it.

    Of the names the ones with the most images come first, and among them the lowest: that is the order in which they are recommended.
    `pair` compares two over the images that both have; `unseen` counts candidates of a search that were not looked at.
    """
    raw = next((score for score in scores if score.row["weights"] == "raw"), None)
    averages = [score for score in scores if score is not raw]
    looks = [score.looks for score in averages]
    verdicts = metrics.against_raw([pair(score, raw) if raw else None for score in averages], looks, unseen)

    def above(a: int, b: int) -> float | None:
        ours, theirs = averages[a].estimate, averages[b].estimate
        if ours.counts == theirs.counts and ours.unbiased <= theirs.unbiased:
            return 1.0  # which most pairs are
        found = pair(averages[a], averages[b])
        return None if found is None else max(looks[a], looks[b]) * found.p_above

    best = [averages[place] for place in metrics.may_be_best(verdicts, above, unseen)]
    if raw is not None and not any(verdict is not None and verdict.better for verdict in verdicts):
        best.append(raw)
    found = [_described(verdict, "delta_vs_raw", "delta_stderr") for verdict in verdicts]
    for key in raw.row.get("measures", {}) if raw else ():
        gaps = [_measured(score, raw, key) for score in averages]
        for more, verdict in zip(found, metrics.against_raw(gaps, looks, unseen), strict=True):
            if verdict is not None:
                more.setdefault("measures_vs_raw", {})[key] = _described(verdict)
    if raw is not None:
        found.insert(scores.index(raw), {})
    rows = [{**score.row, **more} for score, more in zip(scores, found, strict=True)]
    for row in rows:
        row.pop("measures", None)
    best.sort(key=lambda score: (-sum(score.estimate.counts), score.estimate.unbiased))
    return rows, list(dict.fromkeys(score.row["weights"] for score in best))


def _measured(a: Score, raw: Score | None, key: str) -> Estimate | None:
    """The difference in one of a row's measures; None where they are not of the same images."""
    if raw is None or a.estimate.counts != raw.estimate.counts or key not in a.row.get("measures", {}):
        return None
    return metrics.difference(*(Estimate.from_dict(score.row["measures"][key]) for score in (a, raw)))


def _described(verdict: Verdict | None, delta: str = "delta", stderr: str = "stderr") -> dict[str, Any]:
    """A difference from raw for results.json, its interval at the level of its test; empty where there is none."""
    if verdict is None:
        return {}
    gap, interval = verdict.difference, list(verdict.difference.interval(verdict.level))
    found = {delta: gap.unbiased, stderr: gap.stderr, "interval": interval}
    return found | {"p_value": verdict.p_value, "significant": verdict.significant}


def ranked(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """From the lowest corrected distance to the highest."""
    return sorted(rows, key=lambda row: float(row["frechet_distance_unbiased"]))
