"""The answer in one plain sentence: which weights to ship, or why that cannot be said; and which scoring gives it.

| scored | against raw, paired | recommended |
|---|---|---|
| nothing; one entry | | nothing: there is nothing to compare |
| several, without raw | | nothing of averaging; those are named that may be the best |
| raw and averages | no difference is known | nothing; the lowest is named |
| | some better | of those that are better and may be the best: with the most images, the lowest |
| | none better | raw |
| two scorings of one step whose recommendations exclude each other | | nothing: both are named, with the settings that differ |

"Lowest" is by the bias-corrected distance. "Better" and "worse" than raw, and which weights may be the best, are the scorer's
(`metrics/comparisons.py`): each statement is wrong in at most 5% of tables, however many averages a table has, those of a sweep
among them. Averages that are not among those that may be the best are not thereby worse than raw, or than any other one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ddpm_ema.errors import UserError
from ddpm_ema.numbers import listed, verdict_of, with_error
from ddpm_ema.report.record import Row, Scoring, differences

BETTER, WORSE, UNCLEAR, UNKNOWN = verdict_of(-1, True), verdict_of(1, True), verdict_of(0, False), ""
LABELS = {"num_inference_steps": "steps", "num_images": "images", "clip_sample": "clipping of x_0"}


@dataclass(frozen=True)
class Answer:
    """What to ship, in a sentence, and what a reader should know beside it.

    `recommended` are the weights to ship, then all others that may be the best; empty for no recommendation.
    """

    sentence: str
    notes: tuple[str, ...] = ()
    recommended: tuple[str, ...] = ()

    @property
    def best(self) -> str | None:
        return self.recommended[0] if self.recommended else None

    @property
    def brief(self) -> str:
        """`power_0_10 (or ema_0_999)`, `no recommendation`."""
        best, *ties = self.recommended or ("no recommendation",)
        return f"{best} (or {listed(ties, 'or')})" if ties else best


def newest(scorings: Sequence[Scoring]) -> Scoring | None:
    """Of the highest step, then the latest; one that compares raw with an average goes before any that does not."""
    scored = [scoring for scoring in scorings if scoring.rows]
    return max(scored, key=lambda s: (s.compares_with_raw, s.step, s.finished), default=None)


def named(scorings: Sequence[Scoring], text: str) -> Scoring:
    """The scoring of that folder or digest, the newest of several steps. Raises UserError that lists the scorings."""
    name = Path(text).name
    found = [scoring for scoring in scorings if f"-{scoring.folder}".endswith(f"-{name}")]
    if (chosen := newest(found)) is not None:
        return chosen
    lines = [f"  {s.folder}  {s.conditions.removeprefix('With ')}: {judge(s).brief}" for s in scorings]
    raise UserError(f"--scoring {text}: no such scoring in this run; it has\n" + "\n".join(lines or ["  none"]))


def rivals(scoring: Scoring, scorings: Sequence[Scoring]) -> list[Scoring]:
    """Other scorings of the same step whose recommendation excludes this one's, the newest first.

    Two recommendations exclude each other where they have no weights in common, although each scored some that the other
    recommends.
    """

    def excludes(other: Scoring) -> bool:
        theirs, there = set(judge(other).recommended), {row.weights for row in other.entries}
        return bool(not ours & theirs and theirs & here and ours & there)

    ours, here = set(judge(scoring).recommended), {row.weights for row in scoring.entries}
    both = [s for s in scorings if s.step == scoring.step and s.compares_with_raw and scoring.compares_with_raw]
    return sorted(filter(excludes, both), key=lambda other: other.finished, reverse=True)


def differing(scoring: Scoring, other: Scoring) -> str:
    """`sampler (ddim, ddpm) and steps (25, 1,000)`: the settings in which two scorings differ."""
    found = [
        f"{LABELS.get(key, key.removeprefix('versions.').replace('_', ' '))} ({', '.join(values)})"
        for key, values in differences([scoring.settings, other.settings]).items()
        if not key.startswith("reference_origin.")  # other keys say the same
    ]
    return listed(found) or "no settings"


def answer(scoring: Scoring, against: Sequence[Scoring]) -> Answer:
    """The answer of `scoring`, which recommends nothing where the scorings `against` contradict it."""
    own = judge(scoring)
    if not against:
        return own
    says = ". ".join(f"{one.conditions}: {judge(one).brief}" for one in (scoring, *against))
    sentence = f"No weights are recommended, because scorings of step {scoring.step:,} contradict each other. {says}."
    notes = [
        f"Settings that differ ({scoring.folder}, {other.folder}): {differing(scoring, other)}." for other in against
    ]
    return Answer(sentence, (*notes, *own.notes))


def judge(scoring: Scoring) -> Answer:
    """The answer of one scoring alone, by the table above; the sentence begins with what it holds for."""
    found = _decide(scoring)
    copying = " Weights that copy these images would be closer still." if scoring.reading == "training images" else ""
    scope = (
        f"This holds for step {scoring.step:,} of this training run, {scoring.against}.{copying} "
        "Another training run, reference or sampler may rank the weights differently."
    )
    other = [
        f"{row.weights} was scored over {row.num_images:,} images."
        for row in scoring.entries
        if row.weights in found.recommended and row.num_images != scoring.num_images
    ]
    notes = (scope, *found.notes, *other, scoring.saturation(scoring.entries))
    return Answer(f"{scoring.conditions}: {found.sentence}", tuple(filter(None, notes)), found.recommended)


def _decide(scoring: Scoring) -> Answer:
    rows, raw = scoring.entries, scoring.raw
    if not rows:
        return Answer("no weights have a distance, so none are recommended.")
    lowest = f"{scoring.metric_name} {with_error(rows[0].distance, rows[0].stderr)}"
    if len(rows) == 1:
        return Answer(f"only {rows[0].weights} was scored, so there is nothing to compare it with: {lowest}.")
    if raw is None:
        start = f"{rows[0].weights} has the lowest distance of the {len(rows)} weights scored, {lowest}."
        return _of_set(scoring, rows[0], start, " raw was not scored, so whether averaging helps is not known.")
    averages = [row for row in rows if row is not raw]
    better, worse, unknown = (
        [row for row in averages if against_raw(row) == word] for word in (BETTER, WORSE, UNKNOWN)
    )
    if len(unknown) == len(averages):
        start = "no paired difference from raw is known, so no weights are recommended."
        return Answer(f"{start} {rows[0].weights} has the lowest distance, {lowest}.")
    found = _average(scoring, better) if better else _raw(scoring, raw, worse)
    loose = [f"{row.weights} was not compared with raw: no paired difference is known." for row in unknown]
    return Answer(found.sentence, (*found.notes, *loose), found.recommended)


def _average(scoring: Scoring, better: Sequence[Row]) -> Answer:
    """One of those that may be the best, shown to be better than raw where there is such a one."""
    by_name, names = {row.weights: row for row in scoring.entries}, [row.weights for row in better]
    known = [name for name in scoring.may_be_best if name in by_name]
    both = [name for name in known if name in names]
    best = by_name[(both or known or names)[0]]
    why = f"Its {scoring.metric_name} is {_size(best)} below that of raw, a significant difference."
    if (
        not both
    ):  # a narrow average may be shown to be better, and a wide one, paired less well with raw, to be lower yet
        are = "is" if len(better) == 1 else "are"
        why = f"{listed(names)} {are} significantly better than raw, and others are lower still."
    found = _of_set(scoring, best, f"ship {best.weights}. {why}")
    return Answer(found.sentence, tuple(_against(scoring, best)), found.recommended)


def _raw(scoring: Scoring, raw: Row, worse: Sequence[Row]) -> Answer:
    """Raw, where no average is shown to be better."""
    if len(worse) == len(scoring.entries) - 1:
        lowest = f"the lowest is {worse[0].weights}, {_size(worse[0])} above raw"
        return Answer(f"ship raw. Every average is significantly worse; {lowest}.", (), ("raw",))
    more = " More images may decide." if len(scoring.may_be_best) > 1 else ""
    return _of_set(scoring, raw, "ship raw. No average is shown to be better.", more)


def _of_set(scoring: Scoring, best: Row, start: str, end: str = "") -> Answer:
    """`best`, and what else may be the best."""
    others = [name for name in scoring.may_be_best if name != best.weights]
    also = (
        f"The best of this table may also be {listed(others, 'or')}"
        if others
        else "It alone may be the best of this table"
    )
    return Answer(f"{start} {also}.{end}", (), (best.weights, *others))


def _against(scoring: Scoring, best: Row) -> Iterator[str]:
    """Other measures by which raw is better than what is recommended."""
    for key, gap in best.measures_vs_raw.items():
        silent = key == "precision" and scoring.precision_note
        if not gap.significant or gap.delta is None or silent:
            continue
        if (gap.delta > 0) == (key == "kid"):  # of precision and recall, more is better
            where = "above" if gap.delta > 0 else "below"
            label, size = "KID" if key == "kid" else key, with_error(abs(gap.delta), gap.stderr)
            yield f"{best.weights} is worse than raw in {label}: {size} {where} it, a significant difference."


def against_raw(row: Row) -> str:
    """BETTER or WORSE than raw, UNCLEAR, or UNKNOWN where no paired difference was computed."""
    gap = row.versus_raw
    return UNKNOWN if gap is None else verdict_of(gap.delta, gap.significant)


def _size(row: Row) -> str:
    """Of the difference from raw, without its sign."""
    return with_error(abs(row.delta_vs_raw or 0.0), row.delta_stderr)
