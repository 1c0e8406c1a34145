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
MORE = "More images may decide."
RAW = fake_run.row("raw", 5.0)


def scoring(*rows: dict[str, Any], folder: str = "a", finished: int = 0, **changes: Any) -> Scoring:
    time = f"2026-01-01T00:00:{finished:02}Z"
    best = [row["weights"] for row in rows]
    content = fake_run.results(**{"rows": rows, "may_be_best": best, "finished": time, "folder": folder, **changes})
    return Scoring.model_validate_json(json.dumps(content))


def average(name: str, delta: float, error: float, **more: Any) -> dict[str, Any]:
    """A row that is `delta` ± `error` from raw's 5.0; significant where that is more than 2.1 errors."""
    return fake_run.row(name, 5.0 + delta, delta=(delta, error), **more)


def texts(verdict: Answer) -> list[str]:
    """Its notes but the first, which says what every verdict holds for."""
    return list(verdict.notes[1:])


def test_an_average_that_is_shown_to_be_better_is_shipped_though_a_lower_one_is_not_shown() -> None:
    """A narrow average varies with raw's luck less than a wide one: pairing shows 0.45, and does not show 0.50."""
    rows = (RAW, average("ema_0_999", -0.5, 0.3), average("power_0_05", -0.45, 0.05))
    verdict = judge(scoring(*rows, may_be_best=["ema_0_999", "power_0_05"]))
    assert verdict.recommended == ("power_0_05", "ema_0_999")
    assert verdict.sentence == (
        f"{FD}ship power_0_05. Its FD (classifier) is 0.450 ± 0.050 below that of raw, a significant difference. "
        "The best of this table may also be ema_0_999."
    )
    assert texts(verdict) == []


def test_of_several_better_averages_the_lowest_of_those_that_may_be_the_best_is_shipped() -> None:
    rows = [average("a", -3.0, 0.5), average("b", -2.9, 0.5), average("c", -2.8, 0.5), average("d", -1.0, 0.1), RAW]
    verdict = judge(scoring(*rows, may_be_best=["a", "b"]))
    assert verdict.recommended == ("a", "b")
    assert verdict.sentence.endswith(" The best of this table may also be b.")
    assert "c" not in verdict.sentence.split()
    assert judge(scoring(*rows, may_be_best=["a"])).sentence.endswith(" It alone may be the best of this table.")


def test_of_those_that_are_better_the_first_that_may_be_the_best_is_shipped_which_need_not_be_the_lowest() -> None:
    rows = [average("a", -3.0, 0.5), average("b", -2.9, 0.5), RAW]
    few = {"sweep": [average("s", -3.5, 0.5, num_images=250, sweep="std", std=0.1)]}
    assert judge(scoring(*rows, **few, may_be_best=["a", "b", "s"])).recommended == ("a", "b", "s")
    assert judge(scoring(*rows, **few, may_be_best=["s"])).recommended == ("s",)


def test_one_that_beats_all_that_are_better_than_raw_is_shipped_though_alone_it_is_not_shown_to_be_better() -> None:
    rows = [average("wide", -0.7, 0.6), average("narrow", -0.5, 0.1), RAW]
    verdict = judge(scoring(*rows, may_be_best=["wide"]))
    assert verdict.recommended == ("wide",)
    assert verdict.sentence == (
        f"{FD}ship wide. narrow is significantly better than raw, and others are lower still. "
        "It alone may be the best of this table."
    )


@pytest.mark.parametrize(
    ("key", "delta", "significant", "says"),
    [
        ("recall", -0.03, True, "a is worse than raw in recall: 0.0300 ± 0.0050 below it, a significant difference."),
        ("kid", 0.03, True, "a is worse than raw in KID: 0.0300 ± 0.0050 above it, a significant difference."),
        ("kid", -0.03, True, ""),
        ("recall", -0.03, False, ""),
    ],
)
def test_a_measure_by_which_the_recommended_weights_are_worse_than_raw_stands_below_the_answer(
    key: str, delta: float, significant: bool, says: str
) -> None:
    gaps = {key: {"delta": delta, "stderr": 0.005, "significant": significant}}
    verdict = judge(scoring(RAW, average("a", -1.0, 0.1, measures_vs_raw=gaps), may_be_best=["a"]))
    assert texts(verdict) == ([says] if says else [])


def test_where_no_average_is_better_raw_is_shipped_and_all_that_may_be_the_best_are_named() -> None:
    rows = [average("a", -0.4, 0.6), average("b", 0.3, 0.6), average("c", 4.0, 0.6), RAW]
    verdict = judge(scoring(*rows, may_be_best=["a", "raw", "b"]))
    assert verdict.recommended == ("raw", "a", "b")
    assert verdict.sentence == (
        f"{FD}ship raw. No average is shown to be better. The best of this table may also be a or b. {MORE}"
    )


def test_one_that_cannot_be_the_best_is_not_thereby_called_worse_than_raw() -> None:
    rows = [average("a", 0.1, 0.02), average("b", 0.3, 0.6), RAW]
    sentence = judge(scoring(*rows, may_be_best=["raw"])).sentence
    assert sentence == f"{FD}ship raw. No average is shown to be better. It alone may be the best of this table."


def test_raw_is_shipped_alone_where_every_average_is_significantly_worse() -> None:
    verdict = judge(scoring(RAW, average("b", 9.0, 0.5), average("a", 4.0, 0.6), may_be_best=["raw"]))
    assert verdict.recommended == ("raw",)
    assert verdict.sentence == (
        f"{FD}ship raw. Every average is significantly worse; the lowest is a, 4.00 ± 0.60 above raw."
    )


def test_a_row_that_was_not_paired_is_neither_better_nor_worse() -> None:
    loose = fake_run.row("b", 0.5)
    verdict = judge(scoring(RAW, average("a", 4.0, 0.6), loose, may_be_best=["b", "raw"]))
    assert (
        verdict.sentence
        == f"{FD}ship raw. No average is shown to be better. The best of this table may also be b. {MORE}"
    )
    assert texts(verdict) == ["b was not compared with raw: no paired difference is known."]


def test_nothing_is_recommended_without_a_paired_difference() -> None:
    verdict = judge(scoring(RAW, fake_run.row("a", 1.0)))
    assert verdict.recommended == ()
    assert verdict.sentence == (
        f"{FD}no paired difference from raw is known, so no weights are recommended. a has the lowest distance, "
        "FD (classifier) 1.0 ± 1.0."
    )


def test_without_raw_the_lowest_is_named_and_nothing_is_claimed_of_averaging() -> None:
    rows = [fake_run.row("b", 4.9), fake_run.row("a", 2.7, 0.8), fake_run.row("c", 3.1)]
    verdict = judge(scoring(*rows, may_be_best=["a", "c"]))
    assert verdict.recommended == ("a", "c")
    assert verdict.sentence == (
        f"{FD}a has the lowest distance of the 3 weights scored, FD (classifier) 2.70 ± 0.80. The best of this table may also "
        "be c. raw was not scored, so whether averaging helps is not known."
    )


def test_a_single_entry_is_compared_with_nothing() -> None:
    only = "only raw was scored, so there is nothing to compare it with: FD (classifier) 5.0 ± 1.0."
    assert judge(scoring(RAW)) == Answer(f"{FD}{only}", judge(scoring(RAW)).notes, ())
    assert judge(scoring()).sentence == f"{FD}no weights have a distance, so none are recommended."


@pytest.mark.parametrize(
    ("reading", "says"),
    [
        ("training images", "against these training images (R). Weights that copy these images would be closer still."),
        ("population", "against the population of which the reference is a sample (R)."),
        ("images", "against these images (R)."),
    ],
)
def test_every_verdict_says_what_it_holds_for_and_which_reading_of_the_reference(reading: str, says: str) -> None:
    assert judge(scoring(RAW, reference="R", reading=reading)).notes[0] == (
        f"This holds for step 3,000 of this training run, {says} "
        "Another training run, reference or sampler may rank the weights differently."
    )


def test_a_candidate_of_the_sweep_is_shipped_like_any_other_average() -> None:
    """One table: it beat the stored ones, and is exported by its name."""
    verdict = judge(scoring(*fake_run.results()["rows"], **fake_run.swept(), may_be_best=["power_0_14"]))
    assert verdict.recommended == ("power_0_14",)
    assert "ship power_0_14. Its FD (classifier) is 24.8 ± 2.0 below that of raw" in verdict.sentence


def test_samples_that_are_saturated_otherwise_than_the_reference_are_warned_of() -> None:
    rows = [
        fake_run.row("raw", 5.0, saturated=0.82),
        average("a", -1.0, 0.1, saturated=0.58),
        average("b", 1.0, 0.1, saturated=0.39),
    ]
    note = texts(judge(scoring(*rows, reference_saturated=0.50)))[-1]
    assert note == (
        "Channel values at 0 or 255: 82% of raw and 39% of b, but 50% of the reference. The usual cause is the "
        "sampler (steps, clip_sample) or a short training; another sampler may rank weights differently."
    )
    assert not any("Channel" in text for text in texts(judge(scoring(*rows, reference_saturated=None))))


def both(best: str, other: str, **changes: Any) -> Scoring:
    """A scoring in which `best` is shown to be better than raw and than `other`."""
    rows = (RAW, average(best, -2.0, 0.1), average(other, -1.0, 0.1))
    return scoring(*rows, **{"may_be_best": [best], **changes})


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
    table = both("a", "b", folder="00003000-0123-ef01")  # as a scoring names it: digest of the images, of the table
    assert named([old, table], "ef01") is named([old, table], "0123-ef01") is table
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
    assert verdict.notes[0] == "Settings that differ (new, old): sampler (dpm_solver++, ddim) and steps (25, 15)."


def test_scorings_that_do_not_exclude_each_other_are_no_rivals() -> None:
    ours = both("a", "b")
    tied = scoring(RAW, average("a", -1.9, 0.1), average("b", -2.0, 0.1), seed=1)
    earlier = both("b", "a", step=1000)
    others = scoring(RAW, average("c", -2.0, 0.1), may_be_best=["c"], seed=1)  # never scored a, so says nothing of it
    wider = scoring(RAW, average("b", -2.0, 0.1), may_be_best=["b"], seed=1)
    below = scoring(RAW, average("a", -1.0, 0.1), average("c", -2.0, 0.1), may_be_best=["c"], seed=1)
    without_raw = scoring(fake_run.row("b", 1.0), fake_run.row("a", 2.0), may_be_best=["b"])
    assert rivals(ours, [ours, tied, earlier, others, wider, below, without_raw]) == []


def test_what_differs_between_two_scorings_is_every_setting_and_version_that_does() -> None:
    ours = both("a", "b", versions={"torch": "2.15.0"}, extractor_sha256="ab" * 32)
    theirs = both("a", "b", versions={"torch": "2.16.0"}, seed=7, extractor_sha256="cd" * 32, protocol=3, finished=9)
    assert differing(ours, theirs) == (
        "seed (0, 7), extractor sha256 (abababababab, cdcdcdcdcdcd), protocol (2, 3) and torch (2.15.0, 2.16.0)"
    )
    assert differing(ours, both("b", "a", versions={"torch": "2.15.0"})) == "no settings"
