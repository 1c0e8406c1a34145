"""A scoring that goes on under other versions or on another device: only where they give the same images."""

from __future__ import annotations

from collections.abc import Mapping

from ddpm_ema.messages import logger
from ddpm_ema.named_weights import NamedWeights
from ddpm_ema.score.scoring import Scoring
from ddpm_ema.score.together import on_main, only_on_main


def check_versions(scoring: Scoring) -> None:
    """Settles what becomes of a folder that other versions or another device began. A collective; the folder is locked.

    The first images of one of its sets of weights are sampled again. Where they come out the same, the scoring goes on;
    otherwise what there is becomes a scoring of its own, so that it is never paired with new images, and this one begins anew.
    """
    processes = scoring.processes
    if on_main(processes, lambda: _is_known(scoring)):
        return
    source = only_on_main(processes, lambda: _witness(scoring))
    same = processes.broadcast(source is not None) and _repeats(scoring, source)
    on_main(processes, lambda: _go_on(scoring) if same else _begin_anew(scoring))


def _is_known(scoring: Scoring) -> bool:
    if scoring.folder.is_empty():
        scoring.folder.keep_made_with([scoring.versions])
        return True
    return scoring.versions in scoring.folder.made_with()


def _witness(scoring: Scoring) -> NamedWeights | None:
    """Weights of which there are first images, and that can be sampled again."""
    for record in scoring.folder.records():
        if scoring.folder.store(record.key).first() and (source := scoring.source_of(record)) is not None:
            return source
    return None


def _repeats(scoring: Scoring, source: NamedWeights | None) -> bool:
    """Whether the first images come out as they are stored. A collective."""
    label, processes = scoring.label(source), scoring.processes
    stored = scoring.folder.store(label.key).first() if processes.is_main else []
    scoring.load(source, label)
    same = True
    for place, images in enumerate(processes.broadcast([block.indices.tolist() for block in stored])):
        made = scoring.studio.round(f"{label.name} again", images)
        same = same and (not processes.is_main or made.repeats(stored[place]))
    return processes.broadcast(same)


def _go_on(scoring: Scoring) -> None:
    folder = scoring.folder
    known = folder.made_with()
    folder.keep_made_with([*known, scoring.versions])
    logger.info(
        f"{folder.path}: begun under {_differing(known[-1], scoring.versions)}; its first images came out the same"
    )


def _begin_anew(scoring: Scoring) -> None:
    """What there is gets its results.json first, so that nothing that was finished is lost to the report."""
    folder, here = scoring.folder, scoring.versions
    before = (folder.made_with() or [{}])[-1]
    note = f"made under {_differing(before, here)}, where other images came out than later: not comparable with those"
    scoring.versions = before
    scoring.write({key: value for key, value in folder.results().items() if key.startswith("sweep")}, note)
    scoring.versions = here
    aside = folder.set_aside()
    folder.keep_made_with([here])
    logger.info(
        f"{folder.path}: {note}; what there was is a scoring of its own now, {aside.name}, and this one begins anew"
    )


def _differing(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What of `before` is not as it is `now`."""
    return ", ".join(f"{name} {before.get(name, 'unknown')}" for name in now if before.get(name) != now[name])
