"""The sweep over widths, and the search that spends its images where candidates are close."""

import itertools
import json
import shutil
from types import SimpleNamespace

import fake_run
import numpy as np
import pytest
import torch
from scored import STEPS, again, make_run, results, weights

from ddpm_ema import numbers, sampling
from ddpm_ema.averaging import RAW, BiasCorrected, PowerFunction, Uniform, Window, write_snapshot
from ddpm_ema.config import SweepSettings
from ddpm_ema.errors import UserError
from ddpm_ema.metrics import Estimate, Side
from ddpm_ema.named_weights import WeightResolver
from ddpm_ema.rundir import RunDir
from ddpm_ema.score.folder import Record
from ddpm_ema.score.results import table
from ddpm_ema.score.rows import Score
from ddpm_ema.score.search import Search, ladder
from ddpm_ema.score.sweep import candidates, describe, summary

GROUPS = 20


class Valley:
    """Distances of candidates in a valley, known up to noise that most images of two candidates share."""

    def __init__(self, num_candidates: int, best: int, depth: float, seed: int = 0) -> None:
        noise = np.random.default_rng(seed)
        self.true = np.array([depth * (c - best) ** 2 / num_candidates**2 for c in range(num_candidates)])
        self.shared = noise.standard_normal(GROUPS)
        self.own = noise.standard_normal((num_candidates, GROUPS))
        self.asked: list[tuple[int, int]] = []

    def estimate(self, candidate: int, num_images: int) -> Estimate:
        self.asked.append((candidate, num_images))
        spread = 1 / np.sqrt(num_images / GROUPS)
        pseudo = self.true[candidate] + spread * (self.shared + 0.3 * self.own[candidate])
        counts = (num_images // GROUPS,) * GROUPS
        return Estimate(float(pseudo.mean()), (Side(tuple(pseudo.tolist()), counts),))


def search(valley: Valley, first: int = 250, most: int = 4000) -> Search:
    made = Search(len(valley.true), ladder(first, most), valley.estimate)
    assert sum(1 for _ in itertools.islice(made, 200)) < 200, "the search does not end"
    return made


class TestSearch:
    @pytest.mark.parametrize("best", [0, 3, 8, 12, 19])
    @pytest.mark.parametrize("seed", range(4))
    def test_it_ends_at_a_candidate_as_good_as_the_best(self, best, seed):
        valley = Valley(20, best, depth=30.0, seed=seed)
        made = search(valley)
        # Neighbours in the valley's flat floor may lie within what 4,000 images can tell.
        assert valley.true[made.best] <= 0.1
        assert made.counts[made.best] == 4000

    def test_it_spends_few_images_on_poor_candidates(self):
        valley = Valley(33, 20, depth=60.0)
        made = search(valley)
        assert max(made.counts[c] for c in made.counts if valley.true[c] > 5) <= 500
        assert sum(made.counts.values()) < 0.2 * 33 * 4000

    def test_it_spends_all_images_on_neighbours_that_few_cannot_tell_apart(self):
        made = search(Valley(33, 20, depth=6.0))
        assert [made.counts[c] for c in (made.best - 1, made.best, made.best + 1)] == [4000] * 3

    def test_the_neighbours_of_the_best_were_looked_at(self):
        made = search(Valley(33, 20, depth=60.0))
        assert {made.best - 1, made.best + 1} <= set(made.counts)

    def test_it_does_not_ask_for_images_that_were_not_sampled(self):
        valley = Valley(12, 5, depth=3.0)
        made = Search(12, ladder(250, 2000), valley.estimate)
        sampled: dict[int, int] = {}
        for place, images in made:
            assert all(count <= sampled.get(candidate, 0) for candidate, count in valley.asked)
            assert sampled.get(place, 0) < images
            assert images in (250, 500, 1000, 2000)
            sampled[place] = images

    def test_it_halves_the_wider_gap_beside_the_best(self):
        valley = Valley(20, 10, depth=600.0)
        made = Search(20, ladder(250, 4000), valley.estimate)
        looked_at = list(itertools.islice(made, 7))
        assert [place for place, _ in looked_at[:5]] == [0, 5, 10, 14, 19]
        assert looked_at[5:] == [(7, 250), (12, 250)], "between 5 and 10 first, then between 10 and 14"

    @pytest.mark.parametrize("number", [1, 2, 3, 5])
    def test_a_short_range_is_searched_whole(self, number):
        assert set(search(Valley(number, 1, depth=9.0)).counts) == set(range(number))


class TestCandidates:
    def test_widths_are_evenly_spaced_and_decays_evenly_in_the_logarithm_of_what_is_left(self):
        found = candidates(SweepSettings(stds="0.05:0.25:5", decays="0.9:0.999:3"))
        assert [c.name for c in found["std"]] == ["power_0_05", "power_0_10", "power_0_15", "power_0_20", "power_0_25"]
        assert found["std"][2].profile == PowerFunction(std=0.15)
        assert [c.value for c in found["decay"]] == [0.9, 0.99, 0.999]
        assert found["decay"][1].profile == BiasCorrected(decay=0.99)

    def test_decays_of_the_learning_rate_are_evenly_spaced_whole_steps_that_end_at_the_checkpoint(self):
        found = candidates(SweepSettings(cooldowns="2:9:4"), step=40)["cooldown"]
        assert [(c.value, c.name) for c in found] == [(n, f"window_{n}_40") for n in (2, 4, 7, 9)]
        assert found[2].profile == Window(length=7, end=40)
        assert [c.value for c in candidates(SweepSettings(cooldowns="1:3:9"))["cooldown"]] == [1, 2, 3], "each once"

    @pytest.mark.parametrize(
        ("cooldowns", "message"),
        [("20:50:2", "expected at most `end`, 40"), ("0:9:3", "length"), ("-5:9:3", "length"), ("9:9:2", "different")],
    )
    def test_a_decay_longer_than_the_run_or_shorter_than_a_step_is_an_error_at_its_setting(self, cooldowns, message):
        with pytest.raises(UserError, match=message) as error:
            candidates(SweepSettings(cooldowns=cooldowns), step=40)
        assert "evaluation.sweep.cooldowns: " in str(error.value)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"stds": "0.05:0.4:3"}, "std"),
            ({"stds": "0.05:0.05:3"}, "two different ends"),
            ({"stds": "0.05:0.1:1"}, "at least 2"),
            ({"decays": "0.9:1.5:3"}, "between 0 and 1"),
            ({"stds": "1e:e:3"}, "first:last:count"),
        ],
    )
    def test_a_range_that_cannot_be_is_an_error_at_its_setting(self, settings, message):
        with pytest.raises(UserError, match=message) as error:
            candidates(SweepSettings(**settings))
        assert "evaluation.sweep." in str(error.value)


class TestSweep:
    @pytest.fixture(scope="class")
    def run(self, tmp_path_factory):
        run = make_run(tmp_path_factory.mktemp("sweep") / "run", evaluation__weights=["raw"])
        results(run)
        return run

    def test_rows_come_in_order_of_width_with_error_bands_and_what_the_reconstruction_is_worth(self, run):
        sweep = {"stds": "0.05:0.15:3", "decays": "0.5:0.8:2"}
        found = results(again(run, evaluation__sweep=sweep))
        assert [row.get("std") for row in found["sweep"][:3]] == [0.05, 0.1, 0.15]
        assert [row.get("decay") for row in found["sweep"][3:]] == [0.5, 0.8]
        for row in found["sweep"]:
            assert {"stderr", "precision_stderr", "delta_vs_raw", "warnings", "weights_sha256", "versions"} <= set(row)
            assert {"predicted_relative_error", "profile_error", "amplification", "check"} < set(row["reconstruction"])
        assert any("Predicted error" in text for row in found["sweep"] for text in row["warnings"])
        lowest = min(found["sweep"][:3], key=lambda row: row["frechet_distance_unbiased"])
        assert f"lowest std of the sweep: {lowest['std']:g}" in describe(found)
        assert {row["weights"] for row in found["rows"]} == {"raw"}

    def test_saturated_samples_are_warned_of_on_the_terminal_in_one_sentence(self, run, capsys, monkeypatch):
        monkeypatch.setattr(numbers, "SATURATION_MARGIN", 0.05)
        found = results(again(run, evaluation__sweep={"stds": "0.05:0.15:3"}))
        shares = [f"{row['saturated']:.0%} of {row['weights']}" for row in (*found["rows"], *found["sweep"])]
        text = f"{numbers.listed(shares)}, but {found['reference_saturated']:.0%} of the reference"
        assert f"warning: Channel values at 0 or 255: {text}" in capsys.readouterr().err

    def test_an_emulated_decay_is_the_mean_of_the_last_steps_reconstructed_and_scored_beside_the_others(self, tmp_path):
        """Weights that grow by one part per step: the mean of the last D of T is that of step T - (D - 1) / 2."""
        run = make_run(tmp_path / "run", evaluation__weights=["raw"], evaluation__precision_recall=False)
        rundir, last = RunDir(run.output_dir), STEPS[-1]
        shutil.rmtree(run.output_dir / "snapshots")
        for step in range(last + 1):
            mean = weights(0, 1 + (step + 1) / 2 / last)
            write_snapshot(rundir.snapshot_path(step, "raw"), weights(0, 1 + step / last), step, RAW)
            if step:
                write_snapshot(rundir.snapshot_path(step, "uniform"), mean, step, Uniform())
        found = results(again(run, evaluation__sweep={"cooldowns": f"2:{last}:2"}))
        swept = [(row["sweep"], row["cooldown"], row["weights"]) for row in found["sweep"]]
        assert swept == [("cooldown", length, f"window_{length}_{last}") for length in (2, last)]
        assert "lowest cooldown of the sweep" in describe(found)
        resolver = WeightResolver(rundir, rundir.newest_whole()[0], run)
        for row in found["sweep"]:
            assert row["reconstruction"]["predicted_relative_error"] < 1e-3
            expected = weights(0, 1 + (last - (row["cooldown"] - 1) / 2) / last)
            for name, tensor in resolver.named(row["weights"]).members[0]().items():
                torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)

    def test_a_stored_width_is_reconstructed_as_it_was_tracked(self, run):
        found = results(again(run, evaluation__sweep={"stds": "0.05:0.15:3"}, evaluation__weights=["power_0_10"]))
        tracked = next(row for row in found["rows"] if row["weights"] == "power_0_10")
        reconstructed = next(row for row in found["sweep"] if row["std"] == 0.1)
        assert reconstructed["frechet_distance"] == pytest.approx(tracked["frechet_distance"], rel=0.02)

    def test_a_search_over_more_images_than_raw_had_extends_raw_and_is_not_done_twice(self, run, monkeypatch):
        sweep = {"stds": "0.03:0.15:7", "search": True, "num_images": 120}
        searched = again(run, evaluation__sweep=sweep)
        found = results(searched)
        spent = found["sweep_search"]["std"]
        assert spent["candidates"] == 7
        assert 5 * 100 <= spent["images"] <= spent["of"] == 7 * 120
        assert all("delta_vs_raw" in row for row in found["sweep"])
        monkeypatch.setattr(sampling, "sample", None)
        assert results(searched)["sweep"] == found["sweep"]

    def test_a_scoring_without_a_sweep_keeps_what_an_earlier_one_found(self, run):
        before = results(again(run, evaluation__sweep={"stds": "0.05:0.15:3"}))
        assert results(run)["sweep"] == before["sweep"]

    def test_a_sweep_that_came_before_raw_is_paired_with_it_later(self, run):
        other = again(run, evaluation__seed=1, evaluation__weights=["ema_0_9"])
        alone = results(again(other, evaluation__sweep={"stds": "0.05:0.15:2"}))
        assert not any("delta_vs_raw" in row for row in alone["sweep"])
        assert all("delta_vs_raw" in row for row in results(again(other, evaluation__weights=["raw"]))["sweep"])

    def test_a_run_without_snapshots_is_told_how_to_get_them(self, tmp_path):
        run = make_run(tmp_path / "run", evaluation__sweep={"stds": "0.05:0.15:3"}, evaluation__weights=["raw"])
        (run.output_dir / "snapshots").rename(tmp_path / "gone")
        with pytest.raises(UserError, match="snapshots_every"):
            results(run)
        assert not list(run.output_dir.glob("scores/*/weights/*")), "said before anything is sampled"


class Desk:
    """Stands for a scorer whose folder holds these: weights -> {images: distance}. Differences have an error of 0.1."""

    def __init__(self, candidates, named=None, looks=1, unseen=0):
        known = {**candidates, **(named or {})}
        self.known = {name: {n: self.estimated(d, n) for n, d in counts.items()} for name, counts in known.items()}
        self.named = list(named or {})
        self.found = [
            Record(name, name, None, [], self.candidate(name, max(c), looks), {max(c): self.row(name, max(c))}, c)
            for name, c in self.known.items()
            if name in candidates
        ]
        self.found += [
            Record(f"0.3{i}", f"0.3{i}", None, [], self.candidate(f"0.3{i}", 0, looks)) for i in range(unseen)
        ]
        self.folder = SimpleNamespace(records=lambda: self.found, results=dict)

    @staticmethod
    def candidate(name, images, looks):
        return {"kind": "std", "value": float(name), "num_images": images, "looks": looks}

    def row(self, name, images):
        distance = self.known[name][images].unbiased
        return {
            "weights": name,
            "weights_sha256": name,
            "num_images": images,
            "frechet_distance_unbiased": distance,
        }

    @staticmethod
    def estimated(distance, images):
        noise = np.random.default_rng(images + round(1000 * distance)).standard_normal(GROUPS)
        pseudo = distance + 0.1 * GROUPS**0.5 / 2**0.5 * (noise - noise.mean()) / noise.std(ddof=1)
        return Estimate(distance, (Side(tuple(pseudo.tolist()), (images // GROUPS,) * GROUPS),))

    def estimate(self, key, count):
        return self.known[key].get(count)

    def weights_of(self, record):
        return record

    def scores(self):
        return [Score(self.row(name, 400), self.known[name][400]) for name in self.named]

    def found_in(self, spent=None):
        return summary(self, spent or {})


class TestSummary:
    def test_what_another_candidate_or_a_kept_average_beats_cannot_be_the_best(self):
        found = Desk({"0.05": {400: 3.0}, "0.10": {400: 2.0}, "0.15": {400: 2.1}, "0.20": {400: 2.4}}).found_in()
        assert found["may_be_best"] == ["0.10", "0.15"]
        found = Desk({"0.05": {400: 3.0}, "0.10": {400: 2.0}}, {"ema": {400: 1.0}}).found_in()
        assert found["may_be_best"] == ["ema"]

    def test_candidates_are_compared_over_the_images_that_both_have(self):
        """A search leaves poor candidates with few images, over which the best may be another distance away."""
        desk = Desk({"0.05": {200: 2.5}, "0.10": {200: 2.4, 400: 2.0}, "0.15": {200: 3.0}})
        assert desk.found_in()["may_be_best"] == ["0.10", "0.05"], "the one with more images first"

    def test_weights_whose_images_are_gone_are_not_left_out(self):
        assert Desk({"0.05": {200: 9.0}, "0.10": {400: 2.0}}).found_in()["may_be_best"] == ["0.10", "0.05"]

    def test_the_candidates_and_the_kept_averages_are_one_family_against_raw(self):
        named = {"raw": {200: 5.0, 400: 5.0}, "ema": {200: 4.6, 400: 4.6}}
        alone = Desk({"0.10": {400: 4.0}}, named).found_in()
        many = Desk({"0.10": {400: 4.0}, **{f"0.2{i}": {400: 5.0 + i / 100} for i in range(1, 9)}}, named).found_in()
        p_values = [[row["p_value"] for row in found["rows"] if row["weights"] == "ema"] for found in (alone, many)]
        assert p_values[1][0] == pytest.approx(9 * p_values[0][0]), (
            "second smallest of ten instead of the larger of two"
        )
        assert [row["weights"] for row in many["rows"]] == ["ema", "raw"]
        assert "p_value" not in many["rows"][1]
        assert "raw" not in alone["may_be_best"]

    def test_a_search_is_tested_as_often_as_it_may_have_looked_at_as_many_as_it_may_have_looked_at(self):
        named = {"raw": {200: 5.0, 400: 5.0}}
        once = Desk({"0.10": {400: 4.6}}, named).found_in()["sweep"][0]["p_value"]
        spent = {"std": {"candidates": 12, "images": 400, "of": 4800}}
        searched = Desk({"0.10": {400: 4.6}}, named, looks=4, unseen=11).found_in(spent)
        assert searched["sweep"][0]["p_value"] == pytest.approx(12 * 4 * once)
        assert searched["sweep_search"] == spent
        assert Desk({"0.10": {400: 4.6}}, named, looks=4).found_in(spent) == searched, "of an earlier version"
        assert Desk({"0.10": {400: 4.6}}, named, looks=4, unseen=11).found_in()["sweep"] == searched["sweep"]
        assert [row["weights"] for row in searched["sweep"]] == ["0.10"]


def figures_of(row):
    """Without what depends on the other rows of its table."""
    return {key: value for key, value in row.items() if key not in ("p_value", "interval", "significant")}


class TestSweepsInOneFolder:
    """Any order, again and again: right, nothing erased, nothing sampled twice. A seed of its own is a folder of its own."""

    WIDTHS = "0.03:0.15:4"

    @pytest.fixture(scope="class")
    def run(self, tmp_path_factory):
        quick = {"evaluation__precision_recall": False, "evaluation__batch_size": 120}
        quick["evaluation__num_inference_steps"] = 2
        return make_run(tmp_path_factory.mktemp("order") / "run", evaluation__weights=["raw", "ema_0_9"], **quick)

    @staticmethod
    def swept(run, seed, **sweep):
        return results(again(run, evaluation__seed=seed, evaluation__sweep={"num_images": 120, **sweep}))

    @staticmethod
    def counts(found):
        return {row["weights"]: row["num_images"] for row in found["sweep"]}

    def test_a_full_sweep_after_a_search_samples_only_what_is_missing_and_finds_what_it_finds_alone(
        self, run, sampled, tmp_path
    ):
        searched = self.counts(self.swept(run, 1, stds=self.WIDTHS, search=True))
        spent = len(sampled)
        assert 100 in searched.values(), "some candidates got fewer images"
        found = self.swept(run, 1, stds=self.WIDTHS)
        assert set(self.counts(found).values()) == {120}
        assert len(sampled) - spent == sum(120 - count for count in searched.values())
        assert found["sweep_search"]["std"]["candidates"] == 4
        (run.output_dir / "scores").rename(tmp_path / "scores")
        alone = self.swept(run, 1, stds=self.WIDTHS)
        (run.output_dir / "scores").rename(tmp_path / "alone")
        (tmp_path / "scores").rename(run.output_dir / "scores")
        for row, expected in zip(found["sweep"], alone["sweep"], strict=True):
            assert row["weights"] == expected["weights"]
            assert row["frechet_distance"] == pytest.approx(expected["frechet_distance"], rel=0.01)
            assert row["delta_vs_raw"] == pytest.approx(expected["delta_vs_raw"], abs=0.05)

    def test_what_no_search_looked_at_counts_as_a_test_until_a_sweep_looks_at_it(self, run):
        """Whatever other sweeps and searches of the kind there are: their candidates are others."""

        def unseen():
            records = [json.loads(path.read_text()) for path in run.output_dir.glob("scores/*/weights/*.json")]
            return sum((record["candidate"] or {}).get("num_images") == 0 for record in records)

        before, wide = unseen(), {"stds": "0.04:0.12:9", "num_images": 40}
        looked_at = len(self.swept(run, 11, **wide, search=True)["sweep"])
        assert unseen() - before == 9 - looked_at > 0
        self.swept(run, 11, stds="0.045:0.085:5", num_images=40, search=True)
        assert unseen() - before == 9 - looked_at
        self.swept(run, 11, **wide)
        assert unseen() == before

    def test_a_search_after_a_full_sweep_samples_nothing_and_takes_nothing_away(self, run, sampled):
        before = self.swept(run, 2, stds=self.WIDTHS)
        sampled.clear()
        found = self.swept(run, 2, stds=self.WIDTHS, search=True)
        assert sampled == []
        assert found["sweep"] == before["sweep"]
        assert found["may_be_best"] == before["may_be_best"]

    def test_ranges_that_overlap_add_up(self, run, sampled):
        first = self.swept(run, 3, stds="0.05:0.15:3")
        sampled.clear()
        found = self.swept(run, 3, stds="0.10:0.20:3")
        assert [row["std"] for row in found["sweep"]] == [0.05, 0.1, 0.15, 0.2]
        for row, before in zip(found["sweep"][:3], first["sweep"], strict=True):
            assert figures_of(row) == figures_of(before)
            assert row["p_value"] >= before["p_value"], "one more comparison in the family"
        assert len(sampled) == 120

    def test_decays_after_widths_and_widths_after_decays_keep_both(self, run, sampled):
        widths = self.swept(run, 4, stds="0.05:0.15:2")
        both = self.swept(run, 4, decays="0.5:0.8:2")
        assert [row["sweep"] for row in both["sweep"]] == ["std", "std", "decay", "decay"]
        assert list(map(figures_of, both["sweep"][:2])) == list(map(figures_of, widths["sweep"]))
        sampled.clear()
        assert self.swept(run, 4, stds="0.05:0.15:2")["sweep"] == both["sweep"]
        assert sampled == []

    def test_a_candidate_and_the_same_weights_by_name_share_their_images(self, run, sampled):
        self.swept(run, 5, stds="0.05:0.15:2")
        sampled.clear()
        named = again(run, evaluation__seed=5, evaluation__weights=["raw", "power_0_15"])
        row = next(row for row in results(named)["rows"] if row["weights"] == "power_0_15")
        assert (row["num_images"], sampled) == (60, [])
        self.swept(again(run, evaluation__weights=["raw", "power_0_075"]), 5, stds="0.075:0.15:2")
        assert sorted(sampled) == sorted([*range(60), *range(60, 120)]), "by name first, then the rest for the sweep"

    @pytest.mark.parametrize(("seed", "num_images"), [(7, 120), (8, 40)])
    def test_candidates_and_kept_averages_are_one_table_for_which_nothing_more_is_sampled(
        self, run, sampled, seed, num_images
    ):
        found = self.swept(again(run, evaluation__weights=[]), seed, stds="0.05:0.15:2", num_images=num_images)
        assert len(sampled) == max(60, num_images) + 60 + 60 + 2 * num_images
        names = {row["weights"] for row in (*found["rows"], *found["sweep"])}
        assert set(found["may_be_best"]) <= names
        printed = table(found)
        assert [line.split()[0] for line in printed.splitlines()[1:6]] == [
            row["weights"]
            for row in sorted((*found["rows"], *found["sweep"]), key=lambda row: row["frechet_distance_unbiased"])
        ]
        assert f"may be the best of these: {', '.join(found['may_be_best'])}" in printed

    def test_a_search_with_fewer_than_five_images_per_feature_dimension_is_refused(self, run):
        with pytest.raises(UserError, match=r"39 images per candidate are fewer than 5 per feature dimension \(40\)"):
            self.swept(run, 9, stds=self.WIDTHS, num_images=39, search=True)

    def test_a_best_at_the_end_of_the_range_is_said(self, run):
        found = self.swept(run, 10, stds="0.05:0.15:3")
        lines = {place: self.described(found, place) for place in range(3)}
        assert [("end of the range" in lines[place]) for place in range(3)] == [True, False, True]

    @staticmethod
    def described(found, place):
        rows = [{**row, "num_images": 120 + (i == place)} for i, row in enumerate(found["sweep"])]
        return describe({**found, "sweep": rows})


def test_a_width_that_is_kept_and_swept_has_one_line() -> None:
    found = fake_run.results()
    found["sweep"] = [row for row in found["rows"] if row["weights"] == "power_0_10"]
    assert found["sweep"]
    assert sum(line.startswith("power_0_10 ") for line in table(found).splitlines()) == 1
