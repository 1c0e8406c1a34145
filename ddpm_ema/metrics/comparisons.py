"""What a whole table says of its weights, at one error rate for each statement.

"Better than raw", "worse than raw": all averages are compared with one control, and a table that calls any average different
although it is equal to raw is wrong in at most `ALPHA` of tables (Holm 1979, over paired t tests).

"May be the best": the set holds the best weights in at least 1 − `ALPHA` of tables (Gupta 1965). An average leaves it where
another average is below it at ALPHA / (K − 1), one-sided, in a table of K weights, or where it is worse than raw; raw leaves
it where some average is better. That an average is not in the set does not make it worse than any particular other one.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ddpm_ema.metrics.jackknife import Estimate

ALPHA = 0.05
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Verdict:
    """A paired difference, average − raw, as one of all those of its table.

    `level` is what this comparison alone is tested at: `difference.interval(level)` leaves zero out where it is significant.
    """

    difference: Estimate
    p_value: float  # two-sided, adjusted for all comparisons
    level: float

    @property
    def significant(self) -> bool:
        return self.p_value <= ALPHA

    @property
    def better(self) -> bool:
        return self.significant and self.difference.unbiased < 0

    @property
    def worse(self) -> bool:
        return self.significant and self.difference.unbiased > 0


def against_raw(differences: Sequence[Estimate | None], looks: Sequence[int], unseen: int = 0) -> list[Verdict | None]:
    """Holm's step-down test of each difference, average − raw; None where the two were not compared.

    `looks`: at how many numbers of images each average may have been tested, 1 or the rungs of a search; `unseen`: further
    averages that a search might have tested, and did not look at.
    """
    p_values = {i: min(1.0, looks[i] * gap.p_value) for i, gap in enumerate(differences) if gap is not None}
    adjusted = holm(p_values, unseen)
    tests, rejected = len(adjusted) + unseen, sum(p_value <= ALPHA for p_value in adjusted.values())
    verdicts: list[Verdict | None] = [None] * len(differences)
    for rank, (i, p_value) in enumerate(adjusted.items()):
        gap = differences[i]
        assert gap is not None
        level = ALPHA / (tests - min(rank, rejected))  # from the first that is not significant on, none is
        verdicts[i] = Verdict(gap, p_value, level / looks[i])
    return verdicts


def holm(p_values: Mapping[Key, float], unseen: int = 0) -> dict[Key, float]:
    """p-values adjusted for all of them and `unseen` further tests, the smallest first (Holm 1979).

    Those of at most alpha are significant at family-wise rate alpha.
    """
    adjusted, highest = {}, 0.0
    for rank, key in enumerate(sorted(p_values, key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) + unseen - rank) * p_values[key]))
        adjusted[key] = highest
    return adjusted


def may_be_best(
    verdicts: Sequence[Verdict | None], above: Callable[[int, int], float | None], unseen: int = 0
) -> list[int]:
    """Those averages that may be the best weights of their table, by their `verdicts` against raw, None where there is none.

    `above`: (a, b) -> one-sided p-value of average a being above b; None where they were not compared.
    """
    raw = any(verdict is not None for verdict in verdicts)
    level = ALPHA / max(1, len(verdicts) + unseen + raw - 1)

    def stays(a: int) -> bool:
        verdict, others = verdicts[a], (above(a, b) for b in range(len(verdicts)) if b != a)
        return not (verdict is not None and verdict.worse) and all(p is None or p > level for p in others)

    return [a for a in range(len(verdicts)) if stays(a)]
