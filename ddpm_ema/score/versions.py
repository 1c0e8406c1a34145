"""A scoring that goes on under other versions or on another device: only where they give the same images."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ddpm_ema.messages import logger
from ddpm_ema.named_weights import NamedWeights
from ddpm_ema.score.driver import Job, Jobs
from ddpm_ema.score.feature_store import FIRST_IMAGES, ImageBatch
from ddpm_ema.score.generate import IMAGES, Made
from ddpm_ema.score.sampled import Sampled
from ddpm_ema.score.scorer import Scorer
from ddpm_ema.score.sweep import summary


def check_versions(scorers: Sequence[Scorer]) -> Jobs[None]:
    """Settles what becomes of images that other versions or another device began. The scorers share them.

    The first images of one set of weights are sampled again. Where they come out the same, the scoring goes on; otherwise what
    the folder holds, tables included, becomes a scoring of its own, so that it is never paired with new images, and this one
    begins anew.
    """
    sampled, versions = scorers[0].sampled, scorers[0].versions
    known, here = sampled.made_with(), [{**versions, "extractor": key} for key in sampled.extractors]
    if sampled.is_empty():
        sampled.keep_made_with(here)
    elif versions in known:  # a folder of before 2026-12: for all extractors together
        return
    elif new := [entry for entry in here if entry not in known]:
        unknown = [entry["extractor"] for entry in new]
        doubtful = tuple(key for key in unknown if any(sampled.path.glob(f"weights/*/features-{key}-*.safetensors")))
        if not doubtful and any(versions.items() <= entry.items() for entry in known):
            sampled.keep_made_with([*known, *new])
        else:
            weights = next(_witnesses(scorers, doubtful), None)
            same = weights is not None and (yield from _repeats(sampled, weights, doubtful))
            _go_on(sampled, new) if same else _begin_anew(scorers)


def _witnesses(scorers: Sequence[Scorer], extractors: Sequence[str]) -> Iterator[NamedWeights]:
    """Weights of which first images and their features by all of these extractors are stored, and that can be sampled again."""
    sampled = scorers[0].sampled
    recorded = (scorer.weights_of(record) for scorer in scorers for record in scorer.folder.records())
    for weights in (*scorers[0].named(), *recorded):
        if weights is not None and _stored(sampled, weights.key, extractors):
            yield weights


def _stored(sampled: Sampled, key: str, extractors: Sequence[str]) -> list[ImageBatch]:
    lacking = {index for one in extractors for index in sampled.features(key, one).missing(FIRST_IMAGES)}
    batches = sampled.images(key).first_batches()
    return [batch for batch in batches if not lacking & set(batch.indices.tolist())]


def _repeats(sampled: Sampled, weights: NamedWeights, extractors: tuple[str, ...]) -> Jobs[bool]:
    """Whether the first images come out as they are stored, byte for byte, with the same features to rounding."""
    same = True
    for stored in _stored(sampled, weights.key, extractors):
        found: list[Made] = []
        yield Job(f"{weights.name} again", stored.indices.tolist(), extractors, found.append, weights, at_once=True)
        (made,) = found
        same = same and torch.equal(stored.images, made[IMAGES].images)
        for key in extractors:
            before, now = sampled.features(weights.key, key).read(stored.indices).features, made[key].features
            same = same and before.shape == now.shape and _close(before, now)
    return same


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


def _go_on(sampled: Sampled, new: Sequence[Mapping[str, str]]) -> None:
    known = sampled.made_with()
    sampled.keep_made_with([*known, *new])
    logger.info(f"{sampled.path}: begun under {_differing(known[0], new[0])}; its first images came out the same")


def _begin_anew(scorers: Sequence[Scorer]) -> None:
    """Each table gets its results.json first, so that nothing that was finished is lost to the report."""
    sampled, here = scorers[0].sampled, scorers[0].versions
    before = {name: sampled.made_with()[0].get(name, "unknown") for name in here}
    note = f"made under {_differing(before, here)}, where other images came out than later: not comparable with those"
    for scorer in scorers:
        if scorer.folder.records():
            scorer.versions = before
            scorer.write(summary(scorer, {}), note)
            scorer.versions = here
            scorer.folder.forget()
    aside = sampled.set_aside()
    sampled.keep_made_with([{**here, "extractor": key} for key in sampled.extractors])
    logger.info(
        f"{sampled.path}: {note}; what it held is a scoring of its own now, {aside.name}, and this one begins anew"
    )


def _differing(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What of `before` is not as it is `now`."""
    names = [name for name in now if name != "extractor" and before.get(name) != now[name]]
    return ", ".join(f"{name} {before.get(name, 'unknown')}" for name in names)
