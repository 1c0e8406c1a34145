"""Several runs on one page: compared only where they were scored alike, with every setting in which they differ."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import fake_run
import pytest
import yaml

from ddpm_ema import report
from ddpm_ema.errors import UserError
from ddpm_ema.report import compare
from ddpm_ema.report.compare import chosen
from ddpm_ema.report.reading import read


def scored(run: Path, best: float, config: dict[str, Any] | None = None, **changes: Any) -> Path:
    rows = [fake_run.row("raw", 9.0), fake_run.row("power_0_10", best, 0.3, delta=(best - 9.0, 0.5))]
    fake_run.write_results(run, fake_run.results(rows=rows, **changes))
    settings = fake_run.settings()
    settings["training"] |= config or {}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    return run


def test_the_lowest_run_is_named_with_the_error_of_the_difference_of_two_independent_distances(tmp_path: Path) -> None:
    a, b = scored(tmp_path / "a", 4.0), scored(tmp_path / "b", 3.0, {"learning_rate": 5e-4}, model={"channels": 7})
    page, sentence = report.write([a, b])
    assert page == tmp_path / "comparison.html"
    assert sentence == (  # 0.42 = √(0.3² + 0.3²)
        "With dpm_solver++ in 25 steps and 6,000 images per average: of one set of weights per run, power_0_10 of b has the "
        "lowest FD (classifier), 3.00 ± 0.30. That is 1.00 ± 0.42 below power_0_10 of a, more than two standard errors."
    )
    text = page.read_text()
    assert (
        '<th scope="row">training.learning_rate</th><td data-label="a">0.001</td><td data-label="b">0.0005</td>' in text
    )
    assert "training.batch_size" not in text
    assert f"ddpm-ema report {a}</code>" in text


def test_runs_that_were_scored_with_different_settings_are_not_compared(tmp_path: Path) -> None:
    scored(tmp_path / "a", 4.0, step=1000)
    page, sentence = report.write([scored(tmp_path / "a", 4.0), scored(tmp_path / "b", 3.0, sampler="ddim", seed=5)])
    assert "<svg viewBox" not in page.read_text()  # no plot has both
    assert sentence == (
        "The distances of these runs cannot be compared, because they were scored with different settings: "
        "sampler (dpm_solver++, ddim) and seed (0, 5)."
    )


def test_of_several_scorings_those_that_were_made_alike_are_compared(tmp_path: Path) -> None:
    a, b = scored(tmp_path / "a", 4.0), scored(tmp_path / "b", 3.0, sampler="ddim")
    scored(a, 1.0, step=9000, sampler="ddpm")
    scored(a, 5.0, step=2000, sampler="ddim")
    assert [(run.scoring.step, run.scoring.sampler) for run in chosen([read(a), read(b)]) if run.scoring] == [
        *((2000, "ddim"), (3000, "ddim"))
    ]


def test_scorings_of_two_extractors_differ_in_one_column_by_the_first_digits_of_their_hashes(tmp_path: Path) -> None:
    """The reference's extractor is the same one, and 64 digits would leave no room for the answer."""
    run = tmp_path / "a"
    for step, digits in ((2000, "ab"), (3000, "cd")):
        origin = {"split": "train", "size": 1797, "extractor_sha256": 32 * digits}
        scored(run, 4.0, step=step, extractor_sha256=32 * digits, reference_origin=origin)
    record = read(run)
    table = compare.scorings(record, record.scorings[0])
    assert table is not None
    assert [title for title in table.head if "sha256" in title] == ["extractor_sha256"]
    assert {row[table.head.index("extractor_sha256")] for row in table.rows} == {6 * "ab", 6 * "cd"}


def test_a_run_that_was_not_scored_is_shown_without_an_answer(tmp_path: Path) -> None:
    fake_run.make_run(tmp_path / "b")
    scored(tmp_path / "a", 4.0)
    for folder in (tmp_path / "b" / "scores").iterdir():
        (folder / "results.json").unlink()
    page, sentence = report.write([tmp_path / "a", tmp_path / "b"])
    assert sentence == "Fewer than two of these runs have been scored, so there is nothing to compare."
    assert "b. Not scored yet." in page.read_text()
    assert '<th scope="row">Time</th><td data-label="a"></td><td data-label="b">2:36,' in page.read_text()


def test_a_run_whose_scorings_contradict_each_other_recommends_nothing_beside_others_either(tmp_path: Path) -> None:
    a, b = scored(tmp_path / "a", 4.0), scored(tmp_path / "b", 4.2)
    rows = [fake_run.row("raw", 5.0), fake_run.row("power_0_10", 9.0, delta=(4.0, 0.5))]
    other = fake_run.results(rows=rows, may_be_best=["raw"], sampler="ddim", finished="2025-01-01T00:00:00Z")
    fake_run.write_results(a, other)
    text = report.write([a, b])[0].read_text()
    assert "a. No weights are recommended, because scorings of step 3,000 contradict each other." in text
    assert (
        '<th scope="row">Recommended</th><td data-label="a">no recommendation</td><td data-label="b"><code>power'
        in text
    )


def test_runs_of_one_name_are_told_apart_by_their_paths_and_a_scoring_is_chosen_for_one_run_alone(
    tmp_path: Path,
) -> None:
    a, b = scored(tmp_path / "x" / "run", 4.0), scored(tmp_path / "y" / "run", 3.0)
    assert f"power_0_10 of {b} has the lowest" in report.write([a, b])[1]
    with pytest.raises(UserError, match="give one run directory"):
        report.write([a, b], scoring="00003000")


def test_settings_that_unfold_without_end_are_not_unfolded(tmp_path: Path) -> None:
    lists = "a0: &a0 [x, x]\n" + "".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(12))
    maps = "".join(
        f"b{i}: &b{i} {{{', '.join(f'{k}: *a12' if not i else f'{k}: *b{i - 1}' for k in 'pqrstuv')}}}\n"
        for i in range(12)
    )
    runs = [scored(tmp_path / name, 4.0) for name in "ab"]
    (runs[0] / "config.yaml").write_text(lists + maps + "training: {steps: 3, x: *a12}\nz: {y: {x: *b11}}\n")
    assert report.write(runs)[0].stat().st_size < 200_000


def estimate(distance: float, noise: float = 0.0) -> dict[str, Any]:
    """Of three groups, whose error is that of the same noise in every run."""
    groups = {"pseudo_values": [distance - noise, distance, distance + noise], "counts": [20] * 3}
    return {"plain": distance, "sides": [groups], "warnings": []}


def seeded(folder: Path, seed: int, gap: float, noise: float = 0.0, **changes: Any) -> Path:
    rows = [
        fake_run.row("raw", 9.0 + seed, estimate=estimate(9.0 + seed)),
        fake_run.row("power_0_10", 9.0 + seed + gap, delta=(gap, 0.5), estimate=estimate(9.0 + seed + gap, noise)),
    ]
    fake_run.write_results(folder, fake_run.results(rows=rows, **changes))
    (folder / "config.yaml").write_text(yaml.safe_dump(fake_run.settings() | {"seed": seed}))
    return folder


def test_runs_that_differ_in_their_seed_alone_are_read_together(tmp_path: Path) -> None:
    runs = [seeded(tmp_path / str(seed), seed, gap) for seed, gap in enumerate((-3.0, -3.2, -2.9, -3.1))]
    page, sentence = report.write(runs)
    assert sentence == "Over 4 training seeds: power_0_10 is better than raw."
    text = page.read_text()
    assert "\N{MINUS SIGN}3.050\u00a0±\u00a00.065" in text  # mean of the four, and its standard error
    assert "The distances of these runs cannot be compared" not in text


def test_a_difference_that_does_not_hold_over_seeds_is_not_called_one(tmp_path: Path) -> None:
    runs = [seeded(tmp_path / str(seed), seed, gap) for seed, gap in enumerate((-3.0, 2.0, -1.0))]
    assert report.write(runs)[1] == "Over 3 training seeds: no average is shown to be better or worse than raw."


def test_an_error_of_sampling_that_the_seeds_share_counts(tmp_path: Path) -> None:
    runs = [seeded(tmp_path / str(seed), seed, gap, noise=4.0) for seed, gap in enumerate((-3.0, -3.2, -2.9, -3.1))]
    assert report.write(runs)[1] == "Over 4 training seeds: no average is shown to be better or worse than raw."


@pytest.mark.parametrize(
    "damaged",
    [
        {},
        {"sides": 3},
        {"plain": 1, "sides": [{"pseudo_values": ["x"], "counts": [0]}]},
        {"plain": 1, "sides": [], "warnings": []},
    ],
)
def test_seeds_without_estimates_are_set_side_by_side_alone(tmp_path: Path, damaged: dict[str, Any]) -> None:
    runs = [seeded(tmp_path / str(seed), seed, -3.0) for seed in range(2)]
    for results in tmp_path.glob("*/scores/*/results.json"):
        content = json.loads(results.read_text())
        content["rows"][0]["estimate"] = damaged
        results.write_text(json.dumps(content))
    page, sentence = report.write(runs)
    assert "training seeds" not in sentence
    assert "0: its seeds were not read together, because a table lacks estimates: score the runs" in page.read_text()


def test_seeds_that_were_scored_at_different_steps_are_not_read_together(tmp_path: Path) -> None:
    runs = [seeded(tmp_path / str(seed), seed, -3.0 + seed / 10, step=1000 + 1000 * seed) for seed in range(3)]
    assert "training seeds" not in report.write(runs)[1]


def test_a_copy_of_a_run_is_no_further_seed(tmp_path: Path) -> None:
    runs = [seeded(tmp_path / str(i), seed, -3.0 + seed / 10) for i, seed in enumerate((0, 1, 1))]
    assert "training seeds" not in report.write(runs)[1]


def test_what_a_small_distance_owes_to_the_seed_is_shown_to_its_error(tmp_path: Path) -> None:
    runs = [tmp_path / str(seed) for seed in range(3)]
    for seed, run in enumerate(runs):
        rows = [fake_run.row(name, 1e-4, estimate=estimate(1e-4 * (seed + 1))) for name in ("raw", "power_0_10")]
        fake_run.write_results(run, fake_run.results(rows=rows))
        (run / "config.yaml").write_text(yaml.safe_dump(fake_run.settings() | {"seed": seed}))
    assert '<td data-label="What a seed adds">0.000100</td>' in report.write(runs)[0].read_text()


def test_runs_are_told_apart_without_colour(tmp_path: Path) -> None:
    text = report.write([fake_run.make_run(tmp_path / str(i)) for i in range(3)])[0].read_text()
    loss = text[text.index("<h3>Training loss</h3>") :].partition("</figure>")[0]
    assert len(set(re.findall(r'<path class="line" d="M1 5H21" (stroke-dasharray="[^"]+")', loss))) == 3


def test_runs_that_differ_in_more_than_their_seed_are_no_seeds_of_one_run(tmp_path: Path) -> None:
    model = {"block_out_channels": [7]}
    a, b = seeded(tmp_path / "a", 0, -3.0), seeded(tmp_path / "b", 1, -3.0, model=model)
    settings = yaml.safe_load((b / "config.yaml").read_text())
    settings["model"] |= model  # a setting of training and of scoring, which has one row
    settings["training"]["batch_size"] = 32
    (b / "config.yaml").write_text(yaml.safe_dump(settings))
    page, sentence = report.write([a, b])
    assert "Over 2 training seeds" not in sentence
    rows = re.findall('<tr><th scope="row">([^<]*)<', page.read_text())
    assert rows[5:] == ["model.block_out_channels", "training seed", "training.batch_size"]


def test_what_seeds_say_is_computed_once_for_page_and_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, asked = [seeded(tmp_path / str(seed), seed, -3.0 + seed / 10) for seed in range(3)], []
    monkeypatch.setattr(compare, "seeds", lambda compared, real=compare.seeds: asked.append(compared) or real(compared))
    page, sentence = report.write(runs)
    assert sentence == "Over 3 training seeds: power_0_10 is better than raw."
    assert (
        "<h1>Over 3 training seeds: <code>power_0_10</code> is better than <code>raw</code>.</h1>" in page.read_text()
    )
    assert len(asked) == 1


def test_a_run_whose_best_is_a_candidate_of_a_sweep_speaks_by_its_distance(tmp_path: Path) -> None:
    swept = [fake_run.row("power_0_12", 3.5, 0.3, delta=(-5.5, 0.5), sweep="std", std=0.12)]
    a = scored(tmp_path / "a", 4.0, sweep=swept, may_be_best=["power_0_12"])
    (run, _) = chosen([read(a), read(scored(tmp_path / "b", 4.2))])
    assert run.best is not None
    assert (run.best.weights, run.best.distance) == ("power_0_12", 3.5)


def test_the_samples_of_several_runs_begin_with_the_first_one_s_best_and_have_what_lies_nearest(tmp_path: Path) -> None:
    text = report.write([fake_run.make_run(tmp_path / name) for name in "ab"])[0].read_text()
    assert ' checked><label for="gallery1-2">a power_0_10</label>' in text
    assert text.count(" checked>") == 1
    assert "what averaging alone changes" not in text  # between runs, more changes
    assert text.count(fake_run.NEAREST) == 4
    assert "a. With dpm_solver++ in 25 steps and 6,000 images per average: ship <code>power_0_10</code>." in text
