"""The answer in one plain sentence: which weights to ship, and which differences are significant."""

from __future__ import annotations

from dataclasses import dataclass

from ddpm_ema.numbers import decimals, figure, listed, with_error
from ddpm_ema.report.record import Interval, Row, Scoring


@dataclass(frozen=True)
class Verdict:
    """What to ship, in a sentence, and what a reader should know beside it."""

    sentence: str
    notes: tuple[str, ...] = ()
    best: str | None = None


def judge(scoring: Scoring) -> Verdict:
    """The verdict on one scoring. `significant` means: the paired 95% interval leaves out zero."""
    verdict = _judge_copies(scoring)
    if not (scoring.rows and scoring.sweep and scoring.sweep[0].ranked_by < scoring.rows[0].ranked_by):
        return verdict
    found = scoring.sweep[0]
    note = (
        f"The sweep found {found.weights} lower still, at {with_error(found.ranked_by, found.stderr)}; "
        "the lowest of many candidates looks better than it is."
    )
    return Verdict(verdict.sentence, (*verdict.notes, note), verdict.best)


def _judge_copies(scoring: Scoring) -> Verdict:
    if not scoring.rows:
        return Verdict("No copy has been scored yet, so there is nothing to choose between.")
    best, others = scoring.rows[0], scoring.rows[1:]
    if not others:
        sentence = (
            f"Only {best.weights} was scored, so there is nothing to compare it with: {_distance(scoring, best)}."
        )
        return Verdict(sentence, best=best.weights)
    if scoring.raw is None:
        return Verdict(
            f"Ship {best.weights}: {_distance(scoring, best)}{_runner_up(scoring, best)}.", best=best.weights
        )
    if best.weights == "raw":
        return _raw_is_best(scoring, best)
    return _average_is_best(scoring, best)


def _distance(scoring: Scoring, row: Row) -> str:
    return f"its {scoring.metric} is {with_error(row.ranked_by, row.stderr)}, the lowest of those scored"


def _average_is_best(scoring: Scoring, best: Row) -> Verdict:
    gain = best.versus_raw
    if gain is None:
        lead = f"Ship {best.weights}: {_distance(scoring, best)}"
        note = "No paired difference from raw was computed, so whether it is significant is not known."
        return Verdict(f"{lead}{_runner_up(scoring, best)}.", (note,), best.weights)
    size = with_error(abs(gain.delta), gain.stderr)
    if not gain.significant:
        sentence = (
            f"No average is shown to be better than raw: the best, {best.weights}, is {size} below it, "
            "which is not significant. Score more images, or train longer."
        )
        return Verdict(sentence, _ties(scoring, best), best.weights)
    sentence = f"Ship {best.weights}: its distance is {size} below raw\u2019s{_runner_up(scoring, best)}."
    return Verdict(sentence, _ties(scoring, best), best.weights)


def _raw_is_best(scoring: Scoring, raw: Row) -> Verdict:
    nearest = scoring.rows[1]
    difference = nearest.versus_raw
    if difference is None or difference.significant:
        size = (
            ""
            if difference is None
            else f": the nearest, {nearest.weights}, is {with_error(*_size(difference))} above it"
        )
        return Verdict(f"Ship raw: no average is better{size}. Try narrower averages, or train longer.", best="raw")
    sentence = (
        f"Ship raw or {nearest.weights}: the difference between them ({with_error(*_size(difference))}) is not significant, "
        "and no average is shown to be better."
    )
    return Verdict(sentence, _ties(scoring, raw), "raw")


def _size(difference: Interval) -> tuple[float, float]:
    return abs(difference.delta), difference.stderr


def _runner_up(scoring: Scoring, best: Row) -> str:
    """`; the difference from ema_0_999 (0.4 ± 0.6) is not significant`, for the nearest copy that is not raw."""
    rivals = [row for row in scoring.rows if row.weights not in (best.weights, "raw")]
    if not rivals:
        return ""
    rival = rivals[0]
    difference = scoring.pairs.get((rival.weights, best.weights))
    if difference is None:
        size = figure(rival.ranked_by - best.ranked_by, decimals(best.stderr))
        return f"; {rival.weights} comes {size} behind, no paired error of that was computed"
    verb = "is significant" if difference.significant else "is not significant"
    return f"; the difference from {rival.weights} ({with_error(*_size(difference))}) {verb}"


def _ties(scoring: Scoring, best: Row) -> tuple[str, ...]:
    """Names every copy that the scoring cannot tell from the best."""
    tied = [
        row.weights
        for row in scoring.rows
        if (pair := scoring.pairs.get((row.weights, best.weights))) is not None and not pair.significant
    ]
    if not tied:
        return ()
    verb = "is" if len(tied) == 1 else "are"
    return (f"Within what these images can tell, {listed(tied)} {verb} as good as {best.weights}.",)


def reality(scoring: Scoring, row: Row) -> str:
    """What the table says of a copy's difference from raw: better, worse, not significant, or nothing."""
    if row.versus_raw is None:
        return ""
    if not row.versus_raw.significant:
        return "not significant"
    return "better" if row.versus_raw.delta < 0 else "worse"
