"""The answer in one plain sentence: which weights to ship, or why that cannot be said.

| scored | against raw, paired | recommended |
|---|---|---|
| nothing; one entry | | nothing: there is nothing to compare |
| several, without raw | | nothing against raw; the lowest of them, and what cannot be distinguished from it |
| raw and averages | no difference is known | nothing; the lowest is named |
| | some better | of these the lowest, and what cannot be distinguished from it, lower ones that are not significant among them |
| | none better, some not significant | raw, and every average whose difference from it is not significant |
| | all worse | raw |
| two scorings of one step whose recommendations exclude each other | | nothing: both are named, with what differs |

Better, worse and not significant are what `comparison` says. "Lowest" is by the bias-corrected distance.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ddpm_ema.numbers import SATURATION_MARGIN, listed, with_error
from ddpm_ema.report.comparison import BETTER, UNCLEAR, UNKNOWN, against_raw, indistinguishable, significant, unpaired
from ddpm_ema.report.record import Scoring
from ddpm_ema.report.schema import Difference, Row


@dataclass(frozen=True)
class Note:
    """A sentence that belongs to a verdict; `export` names weights that it offers."""

    text: str
    export: str = ""


@dataclass(frozen=True)
class Verdict:
    """What to ship, in a sentence, and what a reader should know beside it.

    `recommended` are the weights to ship, then all that cannot be distinguished from them; empty where nothing can be said.
    """

    sentence: str
    notes: tuple[Note, ...] = ()
    recommended: tuple[str, ...] = ()

    @property
    def best(self) -> str | None:
        return self.recommended[0] if self.recommended else None


def judge(scoring: Scoring) -> Verdict:
    """The verdict on one scoring, by the table above; the sentence begins with what it holds for."""
    found = _decide(scoring)
    scope = Note(
        f"This holds for step {scoring.step:,} of this training run against one reference ({scoring.results.reference}). "
        "Another training run, reference or sampler may rank the weights otherwise."
    )
    notes = (scope, *found.notes, *_sweep(scoring), *(Note(text) for text in saturation(scoring, scoring.rows)))
    return Verdict(f"{scoring.conditions}: {found.sentence}", notes, found.recommended)


def _decide(scoring: Scoring) -> Verdict:
    rows, raw = scoring.rows, scoring.raw
    if not rows:
        return Verdict("nothing has a distance, so there is nothing to choose between.")
    if len(rows) == 1:
        size = with_error(rows[0].distance, rows[0].stderr)
        return Verdict(
            f"only {rows[0].weights} was scored, so there is nothing to compare it with: {scoring.metric} {size}."
        )
    if raw is None:
        return _without_raw(scoring)
    averages = [row for row in rows if row is not raw]
    if all(against_raw(row) == UNKNOWN for row in averages):
        return Verdict(
            f"no paired difference from raw is known, so no weights are recommended. {rows[0].weights} has the lowest "
            f"{scoring.metric}, {with_error(rows[0].distance, rows[0].stderr)}."
        )
    if better := [row for row in averages if against_raw(row) == BETTER]:
        return _average(scoring, better[0])
    if unclear := [row for row in averages if against_raw(row) == UNCLEAR]:
        return _raw_or(scoring, raw, unclear)
    paired = [row for row in averages if row.versus_raw is not None]
    nearest = min(paired, key=lambda row: _delta(row).delta)
    sentence = (
        f"ship raw. {'Every average is' if paired == averages else 'All averages that are paired with it are'} "
        f"significantly worse; the nearest, {nearest.weights}, is {_size(nearest)} above it."
    )
    return Verdict(sentence, tuple(_unpaired(scoring, raw)), ("raw",))


def _average(scoring: Scoring, best: Row) -> Verdict:
    """The lowest of the averages that are significantly better than raw."""
    ties = indistinguishable(scoring, best)
    sentence = f"ship {best.weights}. Its {scoring.metric} is {_size(best)} below that of raw, a significant difference"
    lower = [_lower(scoring, row, best) for row in scoring.rows if row.distance < best.distance]
    names = tuple(row.weights for row in ties)
    return Verdict(f"{sentence}{_tied(names)}.", (*lower, *_unpaired(scoring, best)), (best.weights, *names))


def _lower(scoring: Scoring, row: Row, best: Row) -> Note:
    """Why an average below the recommended one is not the recommended one."""
    versus_raw = row.versus_raw
    known = f"{_signed(versus_raw)}, {against_raw(row)}" if versus_raw else "not paired"
    also = f" It is significantly below {best.weights}." if significant(scoring, row, best) else ""
    size = with_error(row.distance, row.stderr)
    return Note(f"{row.weights} is lower still, at {size}, but not shown to be better than raw ({known}).{also}")


def _raw_or(scoring: Scoring, raw: Row, unclear: Sequence[Row]) -> Verdict:
    choices = [f"{row.weights} ({_signed(_delta(row))} from raw)" for row in unclear]
    sentence = (
        f"ship {listed(['raw', *choices], 'or')}. No average is shown to be better than raw: "
        f"{'this difference is' if len(unclear) == 1 else 'these differences are'} not significant. More images may decide."
    )
    return Verdict(sentence, tuple(_unpaired(scoring, raw)), ("raw", *(row.weights for row in unclear)))


def _without_raw(scoring: Scoring) -> Verdict:
    best = scoring.rows[0]
    names = tuple(row.weights for row in indistinguishable(scoring, best))
    sentence = (
        f"of the {len(scoring.rows)} weights scored, {best.weights} has the lowest {scoring.metric}, "
        f"{with_error(best.distance, best.stderr)}{_tied(names)}. "
        "raw was not scored, so whether averaging helps is not known."
    )
    return Verdict(sentence, tuple(_unpaired(scoring, best)), (best.weights, *names))


def _tied(names: Sequence[str]) -> str:
    return f"; {listed(names)} cannot be distinguished from it" if names else ""


def _unpaired(scoring: Scoring, best: Row) -> Iterator[Note]:
    if rows := unpaired(scoring, best):
        names = listed([row.weights for row in rows])
        yield Note(f"No paired difference of {names} from {best.weights} is known, so nothing is said of it.")


def _delta(row: Row) -> Difference:
    assert row.versus_raw is not None
    return row.versus_raw


def _size(row: Row) -> str:
    return with_error(abs(_delta(row).delta), _delta(row).stderr)


def _signed(difference: Difference) -> str:
    return with_error(difference.delta, difference.stderr, signed=True)


def _sweep(scoring: Scoring) -> Iterator[Note]:
    """A width or decay of the sweep that is lower than every kept average, and can be exported."""
    found = {row.weights: row for row in scoring.sweep}
    for best in scoring.results.sweep_best.values():
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
                f"The sweep found {row.weights} lower still, at {with_error(row.distance, row.stderr)} ({size}). "
                "The lowest of many candidates looks better than it is.",
                export=row.weights,
            )


def saturation(scoring: Scoring, rows: Sequence[Row]) -> Iterator[str]:
    """A warning where samples lie at the ends of the range of pixels far more, or far less, often than the reference."""
    expected = scoring.results.reference_saturated
    if expected is None:
        return
    off = [row for row in rows if row.saturated is not None and abs(row.saturated - expected) > SATURATION_MARGIN]
    if off:
        shares = listed([f"{row.saturated:.0%} of {row.weights}" for row in off])
        yield (
            f"Channel values at 0 or 255: {shares}, but {expected:.0%} of the reference. The sampler may be to blame: "
            "another one, or more steps, may rank the weights otherwise."
        )
