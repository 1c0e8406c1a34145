"""When weights are called better, worse or not distinguishable: one rule, in one place, for headline, table and figures.

The rule is pairwise: `significant` as the scorer wrote it beside a paired difference, which is that the 95% interval of this one
comparison leaves out zero. It is not corrected for several comparisons, nor for the best having been selected.
"""

from __future__ import annotations

from ddpm_ema.numbers import verdict_of
from ddpm_ema.report.record import Scoring
from ddpm_ema.report.schema import Row

BETTER, WORSE, UNCLEAR, UNKNOWN = verdict_of(-1, True), verdict_of(1, True), verdict_of(0, False), ""


def against_raw(row: Row) -> str:
    """BETTER or WORSE than raw, UNCLEAR, or UNKNOWN where no paired difference was computed."""
    difference = row.versus_raw
    return UNKNOWN if difference is None else verdict_of(difference.delta, difference.significant)


def indistinguishable(scoring: Scoring, best: Row) -> list[Row]:
    """Rows whose paired difference from `best` is not significant, by distance."""
    return [row for row in scoring.rows if row is not best and significant(scoring, row, best) is False]


def unpaired(scoring: Scoring, best: Row) -> list[Row]:
    """Rows of which no paired difference from `best` is known."""
    return [row for row in scoring.rows if row is not best and significant(scoring, row, best) is None]


def significant(scoring: Scoring, a: Row, b: Row) -> bool | None:
    """Whether the paired difference of two rows is significant; None where it was not computed."""
    return scoring.significant.get(frozenset((a.weights, b.weights)))
