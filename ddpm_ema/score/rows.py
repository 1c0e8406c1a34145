"""Features of one set of weights → its row of results.json: distance with error bars, KID, Inception score, precision, recall."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ddpm_ema import metrics
from ddpm_ema.config import EvaluationSettings
from ddpm_ema.features import full_precision
from ddpm_ema.metrics import Difference, Estimate, FrechetReference, Reference
from ddpm_ema.numbers import SATURATION_MARGIN
from ddpm_ema.score.feature_store import FeatureBatch

NEIGHBOURS_NEEDED = 4  # precision and recall look at three neighbours beside the image itself
FLAT_CONTRAST = 4  # levels of 255: an image whose values all lie so close together is of one colour to the eye
ALIKE_VARIANCE = 0.01  # of the reference's: samples whose features vary less are nearly all alike


@dataclass(frozen=True)
class Score:
    """Figures of one set of weights: `row` as in results.json, and the `estimate` that pairs it with others."""

    row: dict[str, Any]
    estimate: Estimate


class RowBuilder:
    """Compares features with one reference, on `device`."""

    def __init__(self, reference: Reference, settings: EvaluationSettings, device: torch.device) -> None:
        self.reference, self.settings, self.device = reference, settings, device
        self.frechet = FrechetReference(reference.statistics, device)

    def estimate(self, batch: FeatureBatch, name: str) -> Estimate:
        """The Fréchet distance with its error, alone: what a search needs."""
        return metrics.estimate_distance(batch.features, batch.indices, self.settings.groups, self.frechet, name=name)

    def build(self, batch: FeatureBatch, name: str, more: Mapping[str, Any]) -> Score:
        """All figures. `more` goes into the row (profile, warnings, what a sweep says of a candidate)."""
        start = time.perf_counter()
        estimate = self.estimate(batch, name)
        with full_precision(self.device):  # also beside a training that allows TF32
            others = {**self._kernel_distance(batch), **self._inception_score(batch), **self._precision_recall(batch)}
        row: dict[str, Any] = {
            "weights": name,
            **more,
            "num_images": len(batch),
            "frechet_distance": estimate.distance,
            "frechet_distance_unbiased": estimate.unbiased,
            "stderr": estimate.stderr,
            "interval95": list(estimate.interval95),
            "saturated": float(batch.saturated.double().mean()),
            **others,
        }
        row["warnings"] = [*more.get("warnings", ()), *estimate.warnings, *self._doubts(batch)]
        row["seconds"] = batch.seconds + time.perf_counter() - start
        return Score(row, estimate)

    def _doubts(self, batch: FeatureBatch) -> Iterator[str]:
        """Warnings about samples that look like no image of the reference, whatever their distance."""
        saturated, real = float(batch.saturated.double().mean()), self.reference.saturated
        if real is not None and abs(saturated - real) > SATURATION_MARGIN:
            yield (
                f"{saturated:.1%} of the channel values of these samples are at 0 or 255, {real:.1%} of the reference's: usually "
                "the predicted x_0 was not clipped (evaluation.clip_sample), or the network is undertrained"
            )
        flat = float((batch.contrast <= FLAT_CONTRAST).double().mean())
        if flat > 0.5:
            yield f"{flat:.0%} of these samples are of one colour: the network has learned nothing, or has broken"
        variance, wanted = float(batch.features.var(dim=0).double().sum()), self.frechet.trace
        if variance < ALIKE_VARIANCE * wanted:
            yield f"these samples are nearly all alike: features have {variance / wanted:.2%} of the reference's variance"

    def _kernel_distance(self, batch: FeatureBatch) -> dict[str, float]:
        features = self.reference.features
        if features is None:
            return {}
        settings = self.settings
        sizes = {"subsets": settings.kid_subsets, "subset_size": settings.kid_subset_size}
        mean, std = metrics.kernel_distance(batch.features, features, **sizes, seed=settings.seed)
        return {"kid": mean, "kid_std": std}

    def _inception_score(self, batch: FeatureBatch) -> dict[str, float]:
        if batch.logits is None:
            return {}
        mean, std = metrics.inception_score(batch.logits, seed=self.settings.seed)
        return {"inception_score": mean, "inception_score_std": std}

    def _precision_recall(self, batch: FeatureBatch) -> dict[str, float]:
        features = self.reference.features
        if features is None or not self.settings.precision_recall or len(batch) < NEIGHBOURS_NEEDED:
            return {}
        precision, recall = metrics.precision_recall(batch.features.to(self.device), features, self.reference.radii)
        return {
            "precision": precision,
            # Each image is taken as an independent trial.
            "precision_stderr": math.sqrt(precision * (1 - precision) / len(batch)),
            # Recall has no error here: it moves with the samples' own neighbour distances. A jackknife of it came out 1.1 to
            # 1.5 times too large and took two to seven times as long as recall itself.
            "recall": recall,
        }


def paired(found: Difference) -> dict[str, Any]:
    """A paired difference for results.json."""
    interval = list(found.interval95)
    return {"delta": found.delta, "stderr": found.stderr, "interval": interval, "significant": found.significant}


def versus_raw(score: Score, raw: Estimate | None) -> dict[str, Any]:
    """The paired difference from raw, for a row; empty where there is no raw over the same images."""
    if raw is None or score.row["weights"] == "raw" or raw.counts != score.estimate.counts:
        return {}
    names = {"delta": "delta_vs_raw", "stderr": "delta_stderr"}
    return {names.get(key, key): value for key, value in paired(metrics.difference(score.estimate, raw)).items()}


def pairs(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """The paired difference a − b of every two sets of weights over the same images."""
    return [
        {"a": a.row["weights"], "b": b.row["weights"], **paired(metrics.difference(a.estimate, b.estimate))}
        for a, b in itertools.combinations(scores, 2)
        if a.estimate.counts == b.estimate.counts
    ]


def rows(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """Rows from the best to the worst, with their differences from raw, where raw is among them."""
    raw = next((score.estimate for score in scores if score.row["weights"] == "raw"), None)
    found = [{**score.row, **versus_raw(score, raw)} for score in scores]
    return sorted(found, key=lambda row: float(row["frechet_distance_unbiased"]))
