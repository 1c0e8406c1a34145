"""Which weights the report says to ship: every case of the decision by hand, and which scoring may answer."""

from __future__ import annotations

import json
from typing import Any

import fake_run
import pytest

from ddpm_ema.errors import UserError
from ddpm_ema.report.answer import Answer, answer, differing, judge, named, newest, rivals
from ddpm_ema.report.record import Scoring

FD = "With dpm_solver++ in 25 steps and 6,000 images per average: "
RAW = fake_run.row("raw", 5.0)


def scoring(*rows: dict[str, Any], folder: str = "a", finished: int = 0, **changes: Any) -> Scoring:
    time = f"2026-01-01T00:00:{finished:02}Z"
    content = fake_run.results(**{"rows": rows, "pairs": [], "finished": time, "folder": folder, **changes})
    return Scoring.model_validate_json(json.dumps(content))


def average(name: str, delta: float, error: float, **more: Any) -> dict[str, Any]:
    """A row that is `delta` ± `error` from raw's 5.0; significant where that is more than 2.1 errors."""
    return fake_run.row(name, 5.0 + delta, delta=(delta, error), **more)


def pair(a: str, b: str, delta: float, error: float) -> dict[str, Any]:
    return {"a": a, "b": b, **fake_run.difference(delta, error)}


def texts(verdict: Answer) -> list[str]:
    """Its notes but the first, which says what every verdict holds for."""
    return [note.text for note in verdict.notes[1:]]


def test_an_average_that_is_shown_to_be_better_is_shipped_though_a_lower_one_is_not_shown() -> None:
    """A narrow average varies with raw's luck less than a wide one: pairing shows 0.45, and does not show 0.50."""
    pairs = [pair("ema_0_999", "power_0_05", -0.05, 0.3)]
    verdict = judge(scoring(RAW, average("ema_0_999", -0.5, 0.3), average("power_0_05", -0.45, 0.05), pairs=pairs))
    assert verdict.recommended == ("power_0_05", "ema_0_999")
    assert verdict.sentence == (
        f"{FD}ship power_0_05. Its FD (classifier) is 0.450 ± 0.050 below that of raw, a significant difference. "
        "ema_0_999 may be as good: the difference is not significant."
    )
    assert texts(verdict) == [
        "ema_0_999 is lower still, 4.5 ± 1.0, but not shown to be better than raw (\u22120.50 ± 0.30, not significant)."
    ]


def test_an_average_far_above_raw_is_named_where_its_difference_is_not_significant_though_a_nearer_one_is_worse() -> (
    None
):
    verdict = judge(scoring(RAW, average("power_0_05", 0.1, 0.02), average("ema_0_999", 0.2, 0.3)))
    assert verdict.recommended == ("raw", "ema_0_999")
    assert verdict.sentence == (
        f"{FD}ship raw or ema_0_999 (+0.20 ± 0.30 from raw). No average is shown to be better than raw: this difference is "
        "not significant. More images may decide."
    )


def test_of_several_better_averages_the_lowest_is_shipped_and_all_that_tie_with_it_are_named() -> None:
    rows = [average("a", -3.0, 0.5), average("b", -2.9, 0.5), average("c", -2.8, 0.5), average("d", -1.0, 0.1), RAW]
    pairs = [pair("b", "a", 0.1, 0.1), pair("a", "c", -0.2, 0.2), pair("d", "a", 2.0, 0.3)]
    verdict = judge(scoring(*rows, pairs=pairs))
    assert verdict.recommended == ("a", "b", "c")
    assert verdict.sentence.endswith(" b and c may be as good: the differences are not significant.")


def test_where_no_average_is_better_raw_and_all_that_are_not_worse_are_named() -> None:
    rows = [average("a", -0.4, 0.6), average("b", 0.3, 0.6), average("c", 4.0, 0.6), RAW]
    verdict = judge(scoring(*rows))
    assert verdict.recommended == ("raw", "a", "b")
    assert verdict.sentence == (
        f"{FD}ship raw, a (\u22120.40 ± 0.60 from raw) or b (+0.30 ± 0.60 from raw). No average is shown to be better than "
        "raw: these differences are not significant. More images may decide."
    )


def test_raw_is_shipped_alone_where_every_average_is_significantly_worse() -> None:
    verdict = judge(scoring(RAW, average("b", 9.0, 0.5), average("a", 4.0, 0.6)))
    assert verdict.recommended == ("raw",)
    nearest = "the nearest is a, 4.00 ± 0.60 above raw"
    assert verdict.sentence == f"{FD}ship raw. Every average is significantly worse; {nearest}."


def test_a_row_that_was_not_paired_is_neither_better_nor_worse() -> None:
    loose = fake_run.row("b", 0.5)
    verdict = judge(scoring(RAW, average("a", 4.0, 0.6), loose))
    assert verdict.sentence.startswith(f"{FD}ship raw. All averages that were compared with it are significantly worse")
    assert texts(verdict) == ["b was not compared with raw: no paired difference is known."]
    verdict = judge(scoring(RAW, average("a", -4.0, 0.6), loose))
    assert verdict.recommended == ("a",)
    assert texts(verdict) == [
        "b is lower still, 0.5 ± 1.0, but not shown to be better than raw (not paired).",
        "b was not compared with a: no paired difference is known.",
    ]


def test_a_lower_row_that_is_significantly_below_the_best_but_not_below_raw_is_said_to_be() -> None:
    pairs = [pair("b", "a", -0.2, 0.01)]
    verdict = judge(scoring(RAW, average("a", -0.5, 0.1), average("b", -0.7, 0.6), pairs=pairs))
    assert verdict.recommended == ("a",)
    assert texts(verdict)[0].endswith("(\u22120.70 ± 0.60, not significant). It is significantly below a.")


def test_nothing_is_recommended_without_a_paired_difference() -> None:
    verdict = judge(scoring(RAW, fake_run.row("a", 1.0)))
    assert verdict.recommended == ()
    assert verdict.sentence == (
        f"{FD}no paired difference from raw is known, so no weights are recommended. a has the lowest distance, "
        "FD (classifier) 1.0 ± 1.0."
    )


def test_without_raw_the_lowest_is_named_and_nothing_is_claimed_of_averaging() -> None:
    rows = [fake_run.row("b", 4.9), fake_run.row("a", 2.7, 0.8), fake_run.row("c", 3.1)]
    verdict = judge(scoring(*rows, pairs=[pair("c", "a", 0.4, 0.6), pair("b", "a", 2.2, 0.6)]))
    assert verdict.recommended == ("a", "c")
    assert verdict.sentence == (
        f"{FD}a has the lowest FD (classifier) of the 3 weights scored, 2.70 ± 0.80. c may be as good: the difference is not "
        "significant. raw was not scored, so whether averaging helps is not known."
    )


def test_a_single_entry_is_compared_with_nothing() -> None:
    only = "only raw was scored, so there is nothing to compare it with: FD (classifier) 5.0 ± 1.0."
    assert judge(scoring(RAW)) == Answer(f"{FD}{only}", judge(scoring(RAW)).notes, ())
    assert judge(scoring()).sentence == f"{FD}no weights have a distance, so none are recommended."


def test_every_verdict_says_what_it_holds_for() -> None:
    assert judge(scoring(RAW)).notes[0].text == (
        "This holds for step 3,000 of this training run and one reference (train of digits, 1797 images). "
        "Another training run, reference or sampler may rank the weights differently."
    )


UNPAIRED = "(no paired difference from power_0_10 is known)"


@pytest.mark.parametrize(
    ("delta", "stderr", "significant", "kept", "says"),
    [
        (-0.15, 0.12, False, "power_0_10", "(\u22120.15 ± 0.12 from power_0_10, not significant)"),
        (-0.15, 0.01, True, "power_0_10", "(\u22120.150 ± 0.010 from power_0_10, significant)"),
        (None, None, None, "power_0_10", UNPAIRED),
        (None, None, None, "", UNPAIRED),
        (0.1, 0.2, False, "power_0_10", None),
        (-9.0, 0.2, None, "raw", UNPAIRED),
    ],
)
def test_a_width_of_the_sweep_is_offered_where_it_is_lower_than_every_kept_average(
    delta: float | None, stderr: float | None, significant: bool | None, kept: str, says: str | None
) -> None:
    content = fake_run.swept()
    versus = {"weights": kept, "delta": delta, "stderr": stderr, "significant": significant} if kept else None
    content["sweep_best"]["std"]["versus_best_kept"] = versus
    rows = fake_run.results()["rows"]
    notes = [note for note in judge(scoring(*rows, **content)).notes if note.export]
    expected = f"The sweep found power_0_14 lower still, 2.55 ± 0.78 {says}. The lowest of many candidates looks better than it is."
    assert [(note.text, note.export) for note in notes] == ([(expected, "power_0_14")] if says else [])


def test_a_width_that_is_lower_than_the_kept_averages_but_not_than_raw_is_not_offered() -> None:
    content = fake_run.swept()
    versus = {"weights": "a", "delta": -9.0, "stderr": 0.1, "significant": True}
    content["sweep_best"]["std"]["versus_best_kept"] = versus
    rows = [fake_run.row("raw", 1.0), fake_run.row("a", 12.0, delta=(11.0, 0.1))]
    assert [note.export for note in judge(scoring(*rows, **content)).notes] == [""]


def test_samples_that_are_saturated_otherwise_than_the_reference_are_warned_of() -> None:
    rows = [
        fake_run.row("raw", 5.0, saturated=0.82),
        average("a", -1.0, 0.1, saturated=0.58),
        average("b", 1.0, 0.1, saturated=0.39),
    ]
    note = texts(judge(scoring(*rows, reference_saturated=0.50)))[-1]
    assert note == (
        "Channel values at 0 or 255: 82% of raw and 39% of b, but 50% of the reference. The sampler may be the cause: another "
        "sampler, or more steps, may rank the weights differently."
    )
    assert not any("Channel" in text for text in texts(judge(scoring(*rows, reference_saturated=None))))


def both(best: str, other: str, **changes: Any) -> Scoring:
    """A scoring in which `best` is shown to be better than raw and than `other`."""
    rows = (RAW, average(best, -2.0, 0.1), average(other, -1.0, 0.1))
    return scoring(*rows, pairs=[pair(best, other, -1.0, 0.1)], **changes)


def test_the_newest_scoring_answers_that_compares_raw_with_an_average() -> None:
    early = both("a", "b", step=1000, finished=9)
    late, later = both("a", "b", finished=1, folder="late"), both("a", "b", finished=2, folder="later")
    alone = scoring(RAW, finished=3, folder="alone", num_images=50_000)
    assert newest([later, early, late, alone]) is later
    assert newest([early, alone]) is early
    assert newest([scoring(RAW, step=1000), alone]) is alone
    assert newest([]) is None


def test_a_scoring_is_chosen_by_folder_or_digest_and_an_unknown_one_lists_those_there_are() -> None:
    old, new = both("a", "b", step=1000, folder="00001000-abc"), both("b", "a", folder="00003000-abc", sampler="ddim")
    assert named([old, new], "00001000-abc") is old
    assert named([old, new], "runs/x/scores/00001000-abc/") is old
    assert named([old, new], "abc") is new
    with pytest.raises(UserError) as error:
        named([old, new], "abd")
    assert str(error.value) == (
        "--scoring abd: no such scoring in this run; it has\n"
        "  00001000-abc  dpm_solver++ in 25 steps and 6,000 images per average: a\n"
        "  00003000-abc  ddim in 25 steps and 6,000 images per average: b"
    )


def test_two_scorings_of_one_step_with_different_winners_recommend_neither() -> None:
    ours, theirs = both("a", "b", folder="new"), both("b", "a", folder="old", sampler="ddim", num_inference_steps=15)
    assert rivals(ours, [ours, theirs]) == [theirs]
    verdict = answer(ours, [theirs])
    assert verdict.recommended == ()
    assert verdict.sentence == (
        "No weights are recommended, because scorings of step 3,000 contradict each other. "
        "With dpm_solver++ in 25 steps and 6,000 images per average: a. With ddim in 15 steps and 6,000 images per average: b."
    )
    assert verdict.notes[0].text == "Settings that differ (new, old): sampler (dpm_solver++, ddim) and steps (25, 15)."
    offered = both("a", "b", **fake_run.swept())
    assert [note.export for note in judge(offered).notes if note.export] == ["power_0_14"]
    assert [note.export for note in answer(offered, [theirs]).notes if note.export] == []


def test_scorings_that_do_not_exclude_each_other_are_no_rivals() -> None:
    ours = both("a", "b")
    tied = scoring(RAW, average("a", -1.9, 0.1), average("b", -2.0, 0.1), pairs=[pair("a", "b", 0.1, 0.1)], seed=1)
    earlier = both("b", "a", step=1000)
    others = scoring(RAW, average("c", -2.0, 0.1), seed=1)  # never scored a, so says nothing of it
    wider = scoring(RAW, average("b", -2.0, 0.1), seed=1)
    below = scoring(RAW, average("a", -1.0, 0.1), average("c", -2.0, 0.1), pairs=[pair("c", "a", -1.0, 0.1)], seed=1)
    without_raw = scoring(fake_run.row("b", 1.0), fake_run.row("a", 2.0), pairs=[pair("b", "a", -1.0, 0.1)])
    assert rivals(ours, [ours, tied, earlier, others, wider, below, without_raw]) == []


def test_what_differs_between_two_scorings_is_every_setting_and_version_that_does() -> None:
    ours = both("a", "b", versions={"torch": "2.15.0"}, extractor_sha256="ab" * 32)
    theirs = both("a", "b", versions={"torch": "2.16.0"}, seed=7, extractor_sha256="cd" * 32, protocol=3, finished=9)
    assert differing(ours, theirs) == (
        "seed (0, 7), extractor sha256 (abababababab, cdcdcdcdcdcd), protocol (2, 3) and torch (2.15.0, 2.16.0)"
    )
    assert differing(ours, both("b", "a", versions={"torch": "2.15.0"})) == "no settings"
