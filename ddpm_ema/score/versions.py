"""A scoring that goes on under other versions or on another device: only where they give the same images."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ddpm_ema.messages import logger
from ddpm_ema.named_weights import NamedWeights
from ddpm_ema.score.driver import Job, Jobs
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
    if sampled.is_empty():
        sampled.keep_made_with([versions])
    elif versions not in sampled.made_with():
        weights = next(_witnesses(scorers), None)
        same = weights is not None and (yield from _repeats(sampled, weights))
        _go_on(sampled, versions) if same else _begin_anew(scorers)


def _witnesses(scorers: Sequence[Scorer]) -> Iterator[NamedWeights]:
    """Weights of which first images are stored, and that can be sampled again."""
    sampled = scorers[0].sampled
    recorded = (scorer.weights_of(record) for scorer in scorers for record in scorer.folder.records())
    for weights in (*scorers[0].named(), *recorded):
        if weights is not None and sampled.images(weights.key).first_batches():
            yield weights


def _repeats(sampled: Sampled, weights: NamedWeights) -> Jobs[bool]:
    """Whether the first images come out as they are stored, byte for byte, with the same features to rounding."""
    same = True
    for stored in sampled.images(weights.key).first_batches():
        found: list[Made] = []
        indices = stored.indices.tolist()
        yield Job(f"{weights.name} again", indices, sampled.extractors, found.append, weights, at_once=True)
        (made,) = found
        same = same and torch.equal(stored.images, made[IMAGES].images)
        for extractor in sampled.extractors:
            store = sampled.features(weights.key, extractor)
            if not set(indices) & set(store.missing(indices[-1] + 1)):  # else this extractor is new here
                before, now = store.read(stored.indices).features, made[extractor].features
                same = same and before.shape == now.shape and _close(before, now)
    return same


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


def _go_on(sampled: Sampled, versions: Mapping[str, str]) -> None:
    known = sampled.made_with()
    sampled.keep_made_with([*known, versions])
    logger.info(f"{sampled.path}: begun under {_differing(known[-1], versions)}; its first images came out the same")


def _begin_anew(scorers: Sequence[Scorer]) -> None:
    """Each table gets its results.json first, so that nothing that was finished is lost to the report."""
    sampled, here = scorers[0].sampled, scorers[0].versions
    before = sampled.made_with()[-1]
    note = f"made under {_differing(before, here)}, where other images came out than later: not comparable with those"
    for scorer in scorers:
        if scorer.folder.records():
            scorer.versions = before
            scorer.write(summary(scorer, {}), note)
            scorer.versions = here
            scorer.folder.forget()
    aside = sampled.set_aside()
    sampled.keep_made_with([here])
    logger.info(
        f"{sampled.path}: {note}; what it held is a scoring of its own now, {aside.name}, and this one begins anew"
    )


def _differing(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What of `before` is not as it is `now`."""
    return ", ".join(f"{name} {before.get(name, 'unknown')}" for name in now if before.get(name) != now[name])
