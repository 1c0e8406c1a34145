"""What a whole table says: Holm's test against raw, and the set that holds the best weights."""

import numpy as np
import pytest
from scipy.stats import t

from ddpm_ema.metrics import ALPHA, Estimate, Side, against_raw, difference, may_be_best

GROUPS = 20


def of_p_value(p_value: float, sign: float = -1.0) -> Estimate:
    """A difference of this two-sided p-value."""
    pattern = np.tile([-1.0, 1.0], GROUPS // 2)
    spread = GROUPS**0.5 * pattern / pattern.std(ddof=1)
    return estimated(sign * t.isf(p_value / 2, GROUPS - 1) + spread)


def estimated(pseudo: np.ndarray) -> Estimate:
    return Estimate(float(pseudo.mean()), (Side(tuple(pseudo.tolist()), (100,) * GROUPS),))


class TestAgainstRaw:
    def test_holm_multiplies_the_smallest_p_value_by_all_and_the_others_by_those_that_are_left(self) -> None:
        """0.01, 0.02, 0.04 of three: 0.03, 0.04 and 0.04; the fourth was not compared."""
        verdicts = against_raw([of_p_value(0.02), None, of_p_value(0.01, 1.0), of_p_value(0.04)], [1, 1, 1, 1])
        assert verdicts[1] is None
        found = [verdict for verdict in verdicts if verdict is not None]
        assert [verdict.p_value for verdict in found] == pytest.approx([0.04, 0.03, 0.04])
        assert [(verdict.better, verdict.worse) for verdict in found] == [(True, False), (False, True), (True, False)]

    def test_from_the_first_that_is_not_significant_on_none_is(self) -> None:
        verdicts = against_raw([of_p_value(p) for p in (0.001, 0.03, 0.04)], [1, 1, 1])
        assert [verdict.significant for verdict in verdicts if verdict] == [True, False, False]
        assert [verdict.p_value for verdict in verdicts if verdict] == pytest.approx([0.003, 0.06, 0.06])

    @pytest.mark.parametrize("p_values", [(0.001, 0.024, 0.04), (0.02, 0.021, 0.022), (0.012, 0.024, 0.9)])
    def test_an_interval_leaves_zero_out_exactly_where_its_verdict_is_significant(self, p_values) -> None:
        for verdict in against_raw([of_p_value(p) for p in p_values], [1, 2, 1]):
            assert verdict is not None
            low, high = verdict.difference.interval(verdict.level)
            assert verdict.significant == (not low <= 0 <= high)
            assert verdict.level <= ALPHA

    def test_looks_and_candidates_that_were_not_looked_at_count_as_further_tests(self) -> None:
        (alone,) = against_raw([of_p_value(0.001)], [1])
        (searched,) = against_raw([of_p_value(0.001)], [4], unseen=11)
        assert alone is not None
        assert searched is not None
        assert searched.p_value == pytest.approx(4 * 12 * alone.p_value)


class TestMayBeTheBest:
    def test_an_average_leaves_where_another_beats_it_at_the_level_of_the_table_or_where_it_is_worse_than_raw(
        self,
    ) -> None:
        verdicts = against_raw([of_p_value(0.5), of_p_value(0.5), of_p_value(1e-6, 1.0)], [1, 1, 1])
        level = ALPHA / 3  # raw and three averages
        p_values = {(1, 0): 0.9 * level}
        assert may_be_best(verdicts, lambda a, b: p_values.get((a, b), 0.5)) == [0]
        p_values = {(1, 0): 1.1 * level}
        assert may_be_best(verdicts, lambda a, b: p_values.get((a, b), 0.5)) == [0, 1]
        assert may_be_best(verdicts, lambda a, b: None) == [0, 1], "what was not compared is not beaten"
        assert may_be_best([None, None], lambda a, b: 0.04 if a else 0.5) == [0], "without raw one other is left"


class TestErrorRates:
    """2.5 standard errors of 400 draws are 2.7 percentage points; `benchmarks/error_rates.py` draws more, of more tables."""

    DRAWS = 400

    @pytest.mark.parametrize("alike", [False, True])
    def test_a_table_of_equals_is_wrong_in_one_of_twenty_tables_though_it_has_seven_rows(self, alike: bool) -> None:
        random, different, lost, alone = np.random.default_rng(3), 0, 0, 0
        for _ in range(self.DRAWS):
            shared = random.standard_normal(GROUPS) if alike else np.zeros(GROUPS)
            raw, *averages = [estimated(2 * shared + random.standard_normal(GROUPS)) for _ in range(7)]
            gaps = [difference(average, raw) for average in averages]
            verdicts = against_raw(gaps, [1] * 6)
            different += any(verdict is not None and verdict.significant for verdict in verdicts)
            alone += any(gap.p_value <= ALPHA for gap in gaps)
            stays = may_be_best(verdicts, lambda a, b, of=averages: difference(of[a], of[b]).p_above)
            lost += 2 not in stays
        assert max(different, lost) <= (ALPHA + 0.027) * self.DRAWS
        assert alone > 0.1 * self.DRAWS, "what each comparison alone would say"
