"""A scoring that goes on under other versions or on another device: only where they give the same images."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ddpm_ema.messages import logger
from ddpm_ema.named_weights import NamedWeights
from ddpm_ema.score.driver import Job, Jobs
from ddpm_ema.score.feature_store import FeatureBatch
from ddpm_ema.score.scorer import Scorer


def check_versions(scorer: Scorer) -> Jobs[None]:
    """Settles what becomes of a folder that other versions or another device began.

    The first images of one of its sets of weights are sampled again. Where they come out the same, the scoring goes on;
    otherwise what the folder holds becomes a scoring of its own, so that it is never paired with new images, and this one
    begins anew.
    """
    folder = scorer.folder
    if folder.is_empty():
        folder.keep_made_with([scorer.versions])
    elif scorer.versions not in folder.made_with():
        weights = _witness(scorer)
        same = weights is not None and (yield from _repeats(scorer, weights))
        _go_on(scorer) if same else _begin_anew(scorer)


def _witness(scorer: Scorer) -> NamedWeights | None:
    """Weights of which first images are stored, and that can be sampled again."""
    for record in scorer.folder.records():
        if scorer.folder.store(record.key).first_batches() and (weights := scorer.weights_of(record)) is not None:
            return weights
    return None


def _repeats(scorer: Scorer, weights: NamedWeights) -> Jobs[bool]:
    """Whether the first images come out as they are stored."""
    same = True
    for stored in scorer.folder.store(weights.key).first_batches():
        made: list[FeatureBatch] = []
        yield Job(f"{weights.name} again", stored.indices.tolist(), made.append, weights, at_once=True)
        same = same and _equal(stored, made[0])
    return same


def _equal(a: FeatureBatch, b: FeatureBatch) -> bool:
    """Whether both hold the same images, byte for byte, with the same features to rounding."""
    if not torch.equal(a.images, b.images) or a.features.shape != b.features.shape:
        return False
    return torch.allclose(a.features, b.features, rtol=1e-3, atol=1e-3 * float(b.features.abs().max()))


def _go_on(scorer: Scorer) -> None:
    folder = scorer.folder
    known = folder.made_with()
    folder.keep_made_with([*known, scorer.versions])
    logger.info(
        f"{folder.path}: begun under {_differing(known[-1], scorer.versions)}; its first images came out the same"
    )


def _begin_anew(scorer: Scorer) -> None:
    """What the folder holds gets its results.json first, so that nothing that was finished is lost to the report."""
    folder, here = scorer.folder, scorer.versions
    before = (folder.made_with() or [{}])[-1]
    note = f"made under {_differing(before, here)}, where other images came out than later: not comparable with those"
    scorer.versions = before
    scorer.write({key: value for key, value in folder.results().items() if key.startswith("sweep")}, note)
    scorer.versions = here
    aside = folder.set_aside()
    folder.keep_made_with([here])
    logger.info(
        f"{folder.path}: {note}; what it held is a scoring of its own now, {aside.name}, and this one begins anew"
    )


def _differing(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What of `before` is not as it is `now`."""
    return ", ".join(f"{name} {before.get(name, 'unknown')}" for name in now if before.get(name) != now[name])
