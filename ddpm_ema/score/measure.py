"""Features of one copy → its row: distance with error bars, kernel distance, Inception score, precision and recall."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ddpm_ema import metrics
from ddpm_ema.config import EvaluationSettings
from ddpm_ema.features import full_precision
from ddpm_ema.metrics import Estimate, FrechetReference, Reference
from ddpm_ema.score.blocks import Block

NEIGHBOURS_NEEDED = 4  # precision and recall look at three neighbours beside the image itself


@dataclass(frozen=True)
class Score:
    """One copy's figures: `row` as in results.json, and the `estimate` that pairs it with other copies."""

    row: dict[str, Any]
    estimate: Estimate

    def to_dict(self) -> dict[str, Any]:
        return {"row": self.row, "estimate": self.estimate.to_dict()}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Score:
        """What `to_dict` gave. Raises KeyError or TypeError for anything else."""
        return cls(dict(value["row"]), Estimate.from_dict(value["estimate"]))


class Measure:
    """Compares blocks of features with one reference, kept ready on `device`."""

    def __init__(self, reference: Reference, settings: EvaluationSettings, device: torch.device) -> None:
        self.reference, self.settings, self.device = reference, settings, device
        self.frechet = FrechetReference(reference.statistics, device)

    def estimate(self, block: Block, name: str) -> Estimate:
        """The Fréchet distance with its error, alone: what a search needs."""
        return metrics.estimate_features(block.features, block.indices, self.settings.groups, self.frechet, copy=name)

    def score(self, block: Block, name: str, more: Mapping[str, Any]) -> Score:
        """All figures. `more` goes into the row (profile, warnings, what a sweep says of a candidate)."""
        start = time.perf_counter()
        estimate = self.estimate(block, name)
        with full_precision(self.device):  # also beside a training that allows TF32
            others = {**self._kernel_distance(block), **self._inception_score(block), **self._precision_recall(block)}
        row: dict[str, Any] = {
            "weights": name,
            **more,
            "num_images": len(block),
            "frechet_distance": estimate.distance,
            "frechet_distance_unbiased": estimate.unbiased,
            "stderr": estimate.stderr,
            "interval95": list(estimate.interval95),
            **others,
        }
        row["warnings"] = [*more.get("warnings", ()), *estimate.warnings]
        row["seconds"] = block.seconds + time.perf_counter() - start
        return Score(row, estimate)

    def _kernel_distance(self, block: Block) -> dict[str, float]:
        features = self.reference.features
        if features is None:
            return {}
        settings = self.settings
        kid = metrics.kernel_distance(
            block.features,
            features,
            subsets=settings.kid_subsets,
            subset_size=settings.kid_subset_size,
            seed=settings.seed,
        )
        return {"kid": kid.mean, "kid_std": kid.std}

    def _inception_score(self, block: Block) -> dict[str, float]:
        if block.logits is None:
            return {}
        mean, std = metrics.inception_score(block.logits, seed=self.settings.seed)
        return {"inception_score": mean, "inception_score_std": std}

    def _precision_recall(self, block: Block) -> dict[str, float]:
        features = self.reference.features
        if features is None or not self.settings.precision_recall or len(block) < NEIGHBOURS_NEEDED:
            return {}
        precision, recall = metrics.precision_recall(block.features.to(self.device), features, self.reference.radii)
        return {
            "precision": precision,
            "precision_stderr": _share_stderr(precision, len(block)),
            "recall": recall,
            "recall_stderr": _share_stderr(recall, len(features)),
        }


def _share_stderr(share: float, count: int) -> float:
    """Of a share of `count` images, each taken as an independent trial."""
    return math.sqrt(share * (1 - share) / count)


def versus_raw(score: Score, raw: Score | None) -> dict[str, Any]:
    """The paired difference from raw, for a row; empty where there is no raw over the same images."""
    if raw is None or raw is score or raw.estimate.counts != score.estimate.counts:
        return {}
    found = metrics.difference(score.estimate, raw.estimate)
    return {
        "delta_vs_raw": found.delta,
        "delta_stderr": found.stderr,
        "interval": list(found.interval95),
        "significant": found.significant,
    }


def pairs(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """The paired difference a − b of every two copies over the same images."""
    found = []
    for place, a in enumerate(scores):
        for b in scores[place + 1 :]:
            if a.estimate.counts == b.estimate.counts:
                d = metrics.difference(a.estimate, b.estimate)
                entry = {"a": a.row["weights"], "b": b.row["weights"], "delta": d.delta, "stderr": d.stderr}
                found.append({**entry, "interval": list(d.interval95), "significant": d.significant})
    return found


def rows(scores: Sequence[Score], raw: Score | None) -> list[dict[str, Any]]:
    """Rows from the best to the worst, with their differences from raw."""
    found = [{**score.row, **versus_raw(score, raw)} for score in scores]
    return sorted(found, key=lambda row: float(row["frechet_distance_unbiased"]))
