"""Which scoring of a run answers, and which others contradict it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from ddpm_ema.errors import UserError
from ddpm_ema.numbers import listed
from ddpm_ema.report.record import Scoring
from ddpm_ema.report.verdict import Note, Verdict, judge

LABELS = {"num_inference_steps": "steps", "num_images": "images", "clip_sample": "clipping of x_0"}


def newest(scorings: Sequence[Scoring]) -> Scoring | None:
    """Of the highest step, then the latest; one that compares raw with an average goes before any that does not."""
    scored = [scoring for scoring in scorings if scoring.rows]
    return max(scored, key=lambda s: (s.compares_with_raw, s.step, s.finished), default=None)


def named(scorings: Sequence[Scoring], text: str) -> Scoring:
    """The scoring of that folder or digest, the newest of several steps. Raises UserError that lists those there are."""
    name = Path(text).name
    found = [scoring for scoring in scorings if name in (scoring.folder, scoring.folder.partition("-")[2])]
    if (chosen := newest(found)) is not None:
        return chosen
    there = "\n".join(f"  {scoring.folder}  {_brief(scoring)}" for scoring in scorings)
    raise UserError(f"--scoring {text}: no such scoring in this run; there are\n{there or '  none'}")


def _brief(scoring: Scoring) -> str:
    return f"{scoring.conditions.removeprefix('With ')}: {recommendation(scoring)}"


def recommendation(scoring: Scoring) -> str:
    """`power_0_10 (or ema_0_999)`, `no recommendation`."""
    best, *ties = judge(scoring).recommended or ("no recommendation",)
    return f"{best} (or {listed(ties, 'or')})" if ties else best


def rivals(scoring: Scoring, scorings: Sequence[Scoring]) -> list[Scoring]:
    """Other scorings of the same step whose recommendation excludes this one's, the newest first.

    Two recommendations exclude each other where they have no weights in common, although each scored some that the other
    recommends.
    """
    ours, scored = set(judge(scoring).recommended), {row.weights for row in scoring.rows}
    found = []
    for other in scorings:
        theirs = set(judge(other).recommended)
        if other.step != scoring.step or ours & theirs or not (scoring.compares_with_raw and other.compares_with_raw):
            continue
        if theirs & scored and ours & {row.weights for row in other.rows}:
            found.append(other)
    return sorted(found, key=lambda other: -other.finished)


def answer(scoring: Scoring, against: Sequence[Scoring]) -> Verdict:
    """The verdict on `scoring`, which recommends nothing where the scorings `against` contradict it."""
    own = judge(scoring)
    if not against:
        return own
    says = ". ".join(f"{one.conditions}: {recommendation(one)}" for one in (scoring, *against))
    sentence = f"No weights are recommended, because scorings of step {scoring.step:,} contradict each other. {says}."
    notes = [
        Note(f"What differs ({scoring.folder}, {other.folder}): {differing(scoring, other)}.") for other in against
    ]
    return Verdict(sentence, (*notes, *(note for note in own.notes if not note.export)))


def differing(scoring: Scoring, other: Scoring) -> str:
    """`sampler (ddim, ddpm) and steps (25, 1,000)`: the settings in which two scorings differ."""
    return listed(list(_differing(scoring.settings, other.settings))) or "no settings"


def _differing(ours: dict[str, str], theirs: dict[str, str]) -> Iterator[str]:
    keys = [key for key in dict.fromkeys((*ours, *theirs)) if ours.get(key) != theirs.get(key)]
    for key in keys:
        if key == "settings_digest" or (key.startswith("reference_origin.") and "reference" in keys):
            continue
        label = LABELS.get(key, key.removeprefix("versions.").replace("_", " "))
        yield f"{label} ({_short(ours.get(key))}, {_short(theirs.get(key))})"


def _short(value: str | None) -> str:
    """A sha256 needs no more than its beginning to be told from another."""
    value = "none" if value is None else value
    return value[:12] if len(value) == 64 and " " not in value else value
