"""The sweep over widths, and the search that spends its images where candidates are close."""

from __future__ import annotations

import numpy as np
import pytest
from scored import again, make_run, results

from ddpm_ema import sampling
from ddpm_ema.averaging import BiasCorrected, PowerFunction
from ddpm_ema.config import SweepSettings
from ddpm_ema.errors import UserError
from ddpm_ema.metrics import Estimate
from ddpm_ema.score.search import Search
from ddpm_ema.score.sweep import candidates

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
        return Estimate(0.0, float(pseudo.mean()), 0.0, (0.0, 0.0), tuple(pseudo.tolist()), counts)


def search(valley: Valley, first: int = 250, most: int = 4000) -> Search:
    made = Search(len(valley.true), first, most, valley.estimate)
    for _ in range(200):
        if made.next() is None:
            return made
    raise AssertionError("the search does not end")


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
        made = Search(12, 250, 2000, valley.estimate)
        sampled: dict[int, int] = {}
        while (wanted := made.next()) is not None:
            assert all(count <= sampled.get(candidate, 0) for candidate, count in valley.asked)
            assert sampled.get(wanted[0], 0) < wanted[1] <= 2000
            sampled[wanted[0]] = wanted[1]

    @pytest.mark.parametrize("number", [2, 3, 5])
    def test_a_short_range_is_searched_whole(self, number):
        assert set(search(Valley(number, 1, depth=9.0)).counts) == set(range(number))


class TestCandidates:
    def test_widths_are_evenly_spaced_and_decays_evenly_in_the_logarithm_of_what_is_left(self):
        found = candidates(SweepSettings(stds="0.05:0.25:5", decays="0.9:0.999:3"))
        assert [c.name for c in found["std"]] == ["power_0_05", "power_0_10", "power_0_15", "power_0_20", "power_0_25"]
        assert found["std"][2].profile == PowerFunction(std=0.15)
        assert [c.value for c in found["decay"]] == [0.9, 0.99, 0.999]
        assert found["decay"][1].profile == BiasCorrected(decay=0.99)

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
            assert {"stderr", "precision_stderr", "recall_stderr", "delta_vs_raw", "warnings"} <= set(row)
            assert {"predicted_relative_error", "profile_error", "amplification", "check"} < set(row["reconstruction"])
        assert any("Predicted error" in text for row in found["sweep"] for text in row["warnings"])
        lowest = min(found["sweep"][:3], key=lambda row: row["frechet_distance_unbiased"])
        assert found["sweep_best"]["std"]["weights"] == lowest["weights"]
        assert {row["weights"] for row in found["rows"]} == {"raw"}

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
        assert spent["images"] == sum(row["num_images"] for row in found["sweep"])
        assert all("delta_vs_raw" in row for row in found["sweep"])
        folder = next((run.output_dir / "scores").glob("00000008-*"))
        assert {path.parent.name[:4] for path in folder.glob("copies/*/block-*")} == {"raw-"}
        monkeypatch.setattr(sampling, "sample", None)
        assert results(searched)["sweep"] == found["sweep"]

    def test_a_scoring_without_a_sweep_keeps_what_an_earlier_one_found(self, run):
        before = results(again(run, evaluation__sweep={"stds": "0.05:0.15:3"}))
        assert results(run)["sweep"] == before["sweep"]

    def test_a_run_without_snapshots_is_told_how_to_get_them(self, tmp_path):
        run = make_run(tmp_path / "run", evaluation__sweep={"stds": "0.05:0.15:3"}, evaluation__weights=["raw"])
        (run.output_dir / "snapshots").rename(tmp_path / "gone")
        with pytest.raises(UserError, match="snapshots_every"):
            results(run)
        assert not list(run.output_dir.glob("scores/*/copies/*")), "said before anything is sampled"
