"""The answer in one plain sentence: which weights to ship, or why that cannot be said; and which scoring gives it.

| scored | against raw, paired | recommended |
|---|---|---|
| nothing; one entry | | nothing: there is nothing to compare |
| several, without raw | | the lowest of them, and all whose difference from it is not significant |
| raw and averages | no difference is known | nothing; the lowest is named |
| | some better | the lowest *of these*, and all whose difference from it is not significant |
| | none better, some not significant | raw, and every average whose difference from it is not significant |
| | all worse | raw |
| two scorings of one step whose recommendations exclude each other | | nothing: both are named, with the settings that differ |

"Lowest" is by the bias-corrected distance. "Better", "worse" and "not significant" follow one pairwise rule: `significant` as the
scorer wrote it beside a paired difference, which is that the 95% interval of this one comparison leaves out zero. The rule is not
corrected for several comparisons, nor for the best having been selected.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ddpm_ema.errors import UserError
from ddpm_ema.numbers import SATURATION_MARGIN, listed, verdict_of, with_error
from ddpm_ema.report.record import Difference, Row, Scoring

BETTER, WORSE, UNCLEAR, UNKNOWN = verdict_of(-1, True), verdict_of(1, True), verdict_of(0, False), ""
LABELS = {"num_inference_steps": "steps", "num_images": "images", "clip_sample": "clipping of x_0"}


@dataclass(frozen=True)
class Note:
    """A sentence that belongs to an answer; `export` names weights that it offers."""

    text: str
    export: str = ""


@dataclass(frozen=True)
class Answer:
    """What to ship, in a sentence, and what a reader should know beside it.

    `recommended` are the weights to ship, then all whose difference from them is not significant; empty for no recommendation.
    """

    sentence: str
    notes: tuple[Note, ...] = ()
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
    found = [scoring for scoring in scorings if name in (scoring.folder, scoring.folder.partition("-")[2])]
    if (chosen := newest(found)) is not None:
        return chosen
    lines = [f"  {s.folder}  {s.conditions.removeprefix('With ')}: {judge(s).brief}" for s in scorings]
    raise UserError(f"--scoring {text}: no such scoring in this run; it has\n" + "\n".join(lines or ["  none"]))


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
    return sorted(found, key=lambda other: other.finished, reverse=True)


def differing(scoring: Scoring, other: Scoring) -> str:
    """`sampler (ddim, ddpm) and steps (25, 1,000)`: the settings in which two scorings differ."""
    ours, theirs = scoring.settings, other.settings
    found = []
    for key in dict.fromkeys((*ours, *theirs)):
        repeats = key == "settings_digest" or key.startswith("reference_origin.")  # other keys say the same
        if ours.get(key) != theirs.get(key) and not repeats:
            values = [settings.get(key, "none") for settings in (ours, theirs)]
            shown = ", ".join(value[:12] if len(value) == 64 else value for value in values)  # a sha256 is cut
            found.append(f"{LABELS.get(key, key.removeprefix('versions.').replace('_', ' '))} ({shown})")
    return listed(found) or "no settings"


def answer(scoring: Scoring, against: Sequence[Scoring]) -> Answer:
    """The answer of `scoring`, which recommends nothing where the scorings `against` contradict it."""
    own = judge(scoring)
    if not against:
        return own
    says = ". ".join(f"{one.conditions}: {judge(one).brief}" for one in (scoring, *against))
    sentence = f"No weights are recommended, because scorings of step {scoring.step:,} contradict each other. {says}."
    notes = [
        Note(f"Settings that differ ({scoring.folder}, {other.folder}): {differing(scoring, other)}.")
        for other in against
    ]
    return Answer(sentence, (*notes, *(note for note in own.notes if not note.export)))


def judge(scoring: Scoring) -> Answer:
    """The answer of one scoring alone, by the table above; the sentence begins with what it holds for."""
    found = _decide(scoring)
    scope = Note(
        f"This holds for step {scoring.step:,} of this training run and one reference ({scoring.reference}). "
        "Another training run, reference or sampler may rank the weights differently."
    )
    notes = (scope, *found.notes, *_sweep(scoring), *(Note(text) for text in saturation(scoring, scoring.rows)))
    return Answer(f"{scoring.conditions}: {found.sentence}", notes, found.recommended)


def _decide(scoring: Scoring) -> Answer:
    rows, raw, metric = scoring.rows, scoring.raw, scoring.metric_name
    if not rows:
        return Answer("no weights have a distance, so none are recommended.")
    lowest = f"{metric} {with_error(rows[0].distance, rows[0].stderr)}"
    if len(rows) == 1:
        return Answer(f"only {rows[0].weights} was scored, so there is nothing to compare it with: {lowest}.")
    if raw is None:
        return _without_raw(scoring)
    averages = [row for row in rows if row is not raw]
    by_word = {word: [row for row in averages if against_raw(row) == word] for word in (BETTER, UNCLEAR, WORSE)}
    if by_word[BETTER]:
        return _average(scoring, by_word[BETTER][0])
    if by_word[UNCLEAR]:
        return _raw_or(scoring, raw, by_word[UNCLEAR])
    if not by_word[WORSE]:
        return Answer(
            "no paired difference from raw is known, so no weights are recommended. "
            f"{rows[0].weights} has the lowest distance, {lowest}."
        )
    nearest = min(by_word[WORSE], key=lambda row: _gap(row).delta)
    which = "Every average is"
    if len(by_word[WORSE]) < len(averages):
        which = "All averages that were compared with it are"
    sentence = f"ship raw. {which} significantly worse; the nearest is {nearest.weights}, {_size(nearest)} above raw."
    return Answer(sentence, tuple(_unpaired(scoring, raw)), ("raw",))


def _average(scoring: Scoring, best: Row) -> Answer:
    """The lowest of the averages that are significantly better than raw."""
    ties = _ties(scoring, best)
    gain = f"Its {scoring.metric_name} is {_size(best)} below that of raw, a significant difference."
    lower = [_lower(scoring, row, best) for row in scoring.rows if row.distance < best.distance]
    return Answer(
        f"ship {best.weights}. {gain}{_tied(ties)}", (*lower, *_unpaired(scoring, best)), (best.weights, *ties)
    )


def _lower(scoring: Scoring, row: Row, best: Row) -> Note:
    """Why an average below the recommended one is not the recommended one."""
    known = f"{_signed(row.versus_raw)}, {against_raw(row)}" if row.versus_raw else "not paired"
    also = f" It is significantly below {best.weights}." if significant(scoring, row, best) else ""
    size = with_error(row.distance, row.stderr)
    return Note(f"{row.weights} is lower still, {size}, but not shown to be better than raw ({known}).{also}")


def _raw_or(scoring: Scoring, raw: Row, unclear: Sequence[Row]) -> Answer:
    choices = [f"{row.weights} ({_signed(_gap(row))} from raw)" for row in unclear]
    these = "this difference is" if len(unclear) == 1 else "these differences are"
    sentence = (
        f"ship {listed(['raw', *choices], 'or')}. No average is shown to be better than raw: {these} not significant. "
        "More images may decide."
    )
    return Answer(sentence, tuple(_unpaired(scoring, raw)), ("raw", *(row.weights for row in unclear)))


def _without_raw(scoring: Scoring) -> Answer:
    best = scoring.rows[0]
    ties, size = _ties(scoring, best), with_error(best.distance, best.stderr)
    sentence = (
        f"{best.weights} has the lowest {scoring.metric_name} of the {len(scoring.rows)} weights scored, {size}."
        f"{_tied(ties)} raw was not scored, so whether averaging helps is not known."
    )
    return Answer(sentence, tuple(_unpaired(scoring, best)), (best.weights, *ties))


def _ties(scoring: Scoring, best: Row) -> tuple[str, ...]:
    """Names whose paired difference from `best` is not significant, by distance."""
    return tuple(r.weights for r in scoring.rows if r is not best and significant(scoring, r, best) is False)


def _tied(names: Sequence[str]) -> str:
    if not names:
        return ""
    differences = "difference is" if len(names) == 1 else "differences are"
    return f" {listed(names)} may be as good: the {differences} not significant."


def _unpaired(scoring: Scoring, best: Row) -> Iterator[Note]:
    names = [r.weights for r in scoring.rows if r is not best and significant(scoring, r, best) is None]
    if names:
        was = "was" if len(names) == 1 else "were"
        yield Note(f"{listed(names)} {was} not compared with {best.weights}: no paired difference is known.")


def against_raw(row: Row) -> str:
    """BETTER or WORSE than raw, UNCLEAR, or UNKNOWN where no paired difference was computed."""
    gap = row.versus_raw
    return UNKNOWN if gap is None else verdict_of(gap.delta, gap.significant)


def significant(scoring: Scoring, a: Row, b: Row) -> bool | None:
    """Whether the paired difference of two rows is significant; None where it was not computed."""
    for row, other in ((a, b), (b, a)):
        if other.weights == "raw" and row.versus_raw is not None:
            return row.versus_raw.significant
    names = {a.weights, b.weights}
    return next((pair.significant for pair in scoring.pairs if {pair.a, pair.b} == names), None)


def _gap(row: Row) -> Difference:
    assert row.versus_raw is not None
    return row.versus_raw


def _size(row: Row) -> str:
    return with_error(abs(_gap(row).delta), _gap(row).stderr)


def _signed(difference: Difference) -> str:
    return with_error(difference.delta, difference.stderr, signed=True)


def _sweep(scoring: Scoring) -> Iterator[Note]:
    """A width or decay of the sweep that is lower than every stored average, and can be exported."""
    found = {row.weights: row for row in scoring.sweep}
    for best in scoring.sweep_best.values():
        row, kept = found.get(best.weights), best.versus_best_kept
        if row is None or not scoring.rows:
            continue
        lowest = scoring.rows[0]
        delta, size = row.distance - lowest.distance, f"no paired difference from {lowest.weights} is known"
        if kept is not None and kept.delta is not None and kept.weights == lowest.weights:
            delta, word = kept.delta, "" if kept.significant else "not "
            size = f"{with_error(delta, kept.stderr, signed=True)} from {kept.weights}, {word}significant"
        if delta < 0:
            yield Note(
                f"The sweep found {row.weights} lower still, {with_error(row.distance, row.stderr)} ({size}). "
                "The lowest of many candidates looks better than it is.",
                export=row.weights,
            )


def saturation(scoring: Scoring, rows: Sequence[Row]) -> Iterator[str]:
    """A warning where samples lie at the ends of the range of pixels far more, or far less, often than the reference."""
    expected = scoring.reference_saturated
    if expected is None:
        return
    off = [row for row in rows if row.saturated is not None and abs(row.saturated - expected) > SATURATION_MARGIN]
    if off:
        shares = listed([f"{row.saturated:.0%} of {row.weights}" for row in off])
        yield (
            f"Channel values at 0 or 255: {shares}, but {expected:.0%} of the reference. The sampler may be the cause: "
            "another sampler, or more steps, may rank the weights differently."
        )
