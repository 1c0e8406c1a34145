"""What to store of a run that has not begun: plans fit the disk, predict what the fit predicts, and the best comes first."""

import pytest

from ddpm_ema.averaging import RAW, BiasCorrected, PowerFunction, Uniform, posthoc_coefficients
from ddpm_ema.averaging.plan import plans

TARGETS = [PowerFunction(0.03), PowerFunction(0.2), BiasCorrected(0.999), BiasCorrected(0.9999), RAW]


def test_a_plan_predicts_what_the_fit_predicts_from_the_files_that_it_stores() -> None:
    for plan in plans(1050, TARGETS, 40):
        steps = sorted({*range(plan.every, 1051, plan.every), 1050})
        stored = [(0, RAW), *((step, profile) for step in steps for profile in plan.stored)]
        assert plan.num_files == len(stored) <= 40
        for target, error in zip(TARGETS, plan.errors, strict=True):
            alone = posthoc_coefficients(*zip(*stored, strict=True), 1050, target).predicted_relative_error
            assert error == (None if target == RAW else pytest.approx(alone, rel=1e-6, abs=1e-9))


def test_the_best_plan_warns_least_then_misses_the_goal_least_then_takes_the_fewest_files() -> None:
    found = plans(100_000, TARGETS, 130)
    counts = [
        (sum(e >= 0.05 for e in p.errors if e is not None), sum(e >= 0.01 for e in p.errors if e is not None))
        for p in found
    ]
    assert [(*count, plan.num_files) for count, plan in zip(counts, found, strict=True)] == sorted(
        plan.badness for plan in found
    )
    assert found[0].beyond(0.05) == []


def test_in_a_long_run_a_narrow_decay_cannot_be_brought_back_and_wide_ones_can() -> None:
    for plan in plans(800_000, TARGETS, 140):
        assert 2 in plan.beyond(0.05)
    assert plans(800_000, TARGETS, 140)[0].beyond(0.05) == [2]
    assert all(Uniform() in plan.stored for plan in plans(3000, [BiasCorrected(0.9999)], 140)[:1])


@pytest.mark.parametrize(
    ("steps", "targets", "files", "message"),
    [(0, TARGETS, 9, "got 0"), (100, [], 9, "and 0"), (104, TARGETS, 6, "the smallest needs 7 files")],
)
def test_what_cannot_be_planned_is_refused(steps, targets, files, message) -> None:
    with pytest.raises(ValueError, match=message):
        plans(steps, targets, files)
