"""Scoring: what a name means, what a row says, and what does and does not change the numbers."""

import json
import shutil

import pytest
import torch
from oracles import frechet_distance
from PIL import Image
from scored import again, figures, make_run, results, settings

from ddpm_ema import data, diffusion, metrics, model, sampling, score
from ddpm_ema.distributed import Processes
from ddpm_ema.errors import UserError
from ddpm_ema.features import Architecture, Classifier, Trained, open_extractor, save_classifier
from ddpm_ema.rundir import RunDir
from ddpm_ema.score.results import table


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("score") / "run")


@pytest.fixture(scope="module")
def scored(run):
    return results(run)


class TestTheWholeWay:
    def test_all_weights_get_a_row_from_the_best_to_the_worst(self, run, scored):
        on_disk = json.loads(next((run.output_dir / "scores").glob("00000008-*/results.json")).read_text())
        assert on_disk["rows"] == scored["rows"]
        assert {row["weights"] for row in scored["rows"]} == {"raw", "ema_0_9", "power_0_10"}
        distances = [row["frechet_distance_unbiased"] for row in scored["rows"]]
        assert distances == sorted(distances)
        for key in ("schema", "step", "metric", "extractor", "extractor_sha256", "reference", "num_images", "sampler"):
            assert key in scored
        assert (scored["schema"], scored["step"], scored["metric"]) == (3, 8, "fd")

    def test_the_numbers_are_those_of_the_same_images_made_by_hand(self, run, scored):
        """Sampled, read and compared here with nothing of the scorer: 60 images of raw against the digits."""
        evaluation = run.evaluation
        network = model.build(run).eval()
        network.load_state_dict(RunDir(run.output_dir).checkpoint(8).weights("raw"))
        images = sampling.sample(
            lambda x, t, c: network(x, t, return_dict=False)[0],
            sampling.Sampler(diffusion.noise_scheduler(run.diffusion).config, evaluation),
            seed=evaluation.seed,
            indices=torch.arange(60),
            image_shape=(1, 8, 8),
            device="cpu",
        )
        extractor = open_extractor("classifier", run.output_dir)
        real = data.load(run.data).batch(torch.arange(1797))
        ours, theirs = (metrics.statistics_of(extractor(x)) for x in (images, real))
        row = next(row for row in scored["rows"] if row["weights"] == "raw")
        assert row["frechet_distance"] == pytest.approx(frechet_distance(ours, theirs), rel=1e-3)

    def test_differences_from_raw_are_paired_and_marked(self, scored):
        rows = {row["weights"]: row for row in scored["rows"]}
        for name in ("ema_0_9", "power_0_10"):
            row = rows[name]
            delta = row["frechet_distance_unbiased"] - rows["raw"]["frechet_distance_unbiased"]
            low, high = row["interval"]
            assert row["delta_vs_raw"] == pytest.approx(delta)
            assert low < delta < high
            assert row["significant"] == (not low <= 0 <= high)
            unpaired = (row["stderr"] ** 2 + rows["raw"]["stderr"] ** 2) ** 0.5
            assert row["delta_stderr"] < unpaired
        assert "delta_vs_raw" not in rows["raw"]
        assert set(scored["may_be_best"]) <= set(rows)

    def test_the_grid_shows_a_labelled_row_per_weights(self, run, scored):
        with Image.open(next((run.output_dir / "scores").glob("00000008-*/grid.png"))) as grid:
            assert grid.height > 3 * 48
            assert grid.width > 5 * 48

    def test_a_complete_scoring_says_so_and_redoes_nothing(self, run, scored, capsys, monkeypatch):
        monkeypatch.setattr(sampling, "sample", None)  # calling it would be an error
        again_scored = results(run)
        assert "already complete" in capsys.readouterr().err
        assert again_scored["rows"] == scored["rows"]

    def test_weights_scored_earlier_stay_in_the_table(self, run, scored):
        found = results(again(run, evaluation__weights=["raw@4"]))
        assert {row["weights"] for row in found["rows"]} == {"raw@4", "raw", "ema_0_9", "power_0_10"}

    def test_every_checkpoint_is_scored_where_all_are_asked_for(self, run):
        found = score.run(again(run, evaluation__steps="all", evaluation__weights=["raw"]))
        assert [result["step"] for result in found] == [4, 8]
        assert found[0]["rows"] != found[1]["rows"]

    def test_rows_are_sorted_and_have_their_verdicts_in_the_printed_table(self, scored):
        lines = table(scored).splitlines()
        assert "FD (classifier)" in lines[0]
        assert [line.split()[0] for line in lines[1:-1]] == [row["weights"] for row in scored["rows"]]
        assert sum(word in " ".join(lines) for word in ("better", "worse", "not significant")) >= 1


class TestSeveralExtractors:
    """Two classifiers that differ in seed and architecture."""

    def test_each_gives_the_table_that_it_gives_alone_from_one_sampling(self, tmp_path, sampled, capsys):
        run = make_run(tmp_path / "run", evaluation__weights=["raw", "ema_0_9"])
        other = tmp_path / "wide.safetensors"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            network = Classifier(Architecture(channels=1, image_size=8, num_classes=10, width=6, dim=12)).eval()
        save_classifier(other, Trained(network, 0.1), fingerprint="none", seed=1)
        both = score.run(again(run, evaluation__extractors=["classifier", f"classifier={other}"]))
        assert sorted(sampled) == sorted([*range(60)] * 2), "each image of each set of weights once"
        assert [found["extractor"] for found in both] == ["classifier", "classifier wide"]
        text = capsys.readouterr().err
        assert "FD (classifier)" in text
        assert "FD (classifier wide)" in text
        sampled.clear()
        alone = results(again(run, evaluation__extractors=[f"classifier={other}"]))
        assert sampled == []
        assert alone["rows"] == both[1]["rows"]
        fresh = make_run(tmp_path / "fresh", evaluation__weights=["raw", "ema_0_9"])
        assert figures(results(fresh)) == figures(both[0])
        for row in both[1]["rows"]:
            assert row["seconds"] == pytest.approx(sum(row["seconds_of"].values()))
            assert {"sampling", "features", "distance", "kid"} <= row["seconds_of"].keys()

    def test_another_reference_or_more_images_sample_nothing_twice(self, tmp_path, sampled):
        run = make_run(tmp_path / "run", evaluation__weights=["raw"], data__held_out=0.3)
        results(run)
        sampled.clear()
        results(again(run, evaluation__reference="held_out"))
        assert sampled == []
        results(again(run, evaluation__num_images=80))
        assert sampled == list(range(60, 80))


class TestWhatChangesTheNumbers:
    @pytest.mark.parametrize("batch_size", [16, 50])
    def test_the_batch_size_does_not(self, tmp_path, scored, batch_size):
        run = make_run(tmp_path / "run", evaluation__batch_size=batch_size)
        found = results(run)
        assert found["settings_digest"] == scored["settings_digest"]
        for name, numbers in figures(scored).items():
            # A pixel on the edge between two levels may round either way in another batch.
            assert figures(found)[name] == pytest.approx(numbers, rel=0.01)


class TestWeights:
    def test_an_ensemble_is_scored_under_its_name(self, run):
        found = results(again(run, evaluation__weights=["raw", "raw+ema_0_9"]))
        row = next(row for row in found["rows"] if row["weights"] == "raw+ema_0_9")
        assert row["profile"]["kind"] == "ensemble"

    def test_a_name_spelled_twice_is_one_row(self, run):
        found = results(again(run, evaluation__weights=["power_0_1", "power_0_10", "bias_corrected_0_9", "raw@008"]))
        names = {row["weights"] for row in found["rows"]}
        assert {"power_0_10", "bias_corrected_0_90", "raw@8"} <= names
        assert not names & {"power_0_1", "bias_corrected_0_9", "raw@008"}

    def test_a_run_of_snapshots_alone_is_scored_by_the_names_of_profiles(self, run, tmp_path):
        alone = settings(tmp_path / "alone", evaluation__weights=["power_0_06", "power_0_06@4"])
        shutil.copytree(run.output_dir / "snapshots", alone.output_dir / "snapshots")
        shutil.copy(run.output_dir / "features.safetensors", alone.output_dir)
        found = figures(results(alone))
        assert found["power_0_06"] == figures(results(again(run, evaluation__weights=["power_0_06"])))["power_0_06"]
        assert found["power_0_06@4"] != found["power_0_06"]

    def test_settings_of_another_model_than_the_one_trained_are_refused(self, run):
        with pytest.raises(UserError, match=r"diffusion.schedule: 'linear' was trained, 'cosine' is set"):
            score.run(again(run, diffusion__schedule="cosine"))


class TestConditional:
    def test_a_class_conditional_model_is_guided_and_says_so(self, tmp_path):
        run = make_run(tmp_path / "run", labels=True, evaluation__weights=["raw"])
        plain = results(run)
        guided = results(again(run, evaluation__guidance_scale=2.0))
        assert guided["guidance_scale"] == 2.0
        assert figures(plain)["raw"] != figures(guided)["raw"]

    def test_another_seed_asks_for_other_classes(self, tmp_path, monkeypatch):
        run, asked = make_run(tmp_path / "run", labels=True, evaluation__weights=["raw"]), []
        sample = sampling.sample

        def recording(*arguments, **options):
            asked[-1].extend(options["labels"].tolist())
            return sample(*arguments, **options)

        monkeypatch.setattr(sampling, "sample", recording)
        for seed in (0, 1):
            asked.append([])
            results(again(run, evaluation__seed=seed))
        assert len(asked[0]) == len(asked[1]) == 60
        assert asked[0] != asked[1]
        assert set(asked[0]) == set(range(10))


class TestWhileTraining:
    @pytest.fixture(scope="class")
    def evaluator(self, run):
        quick = again(run, evaluation__every=1, evaluation__every_num_images=60)
        return score.while_training(quick, Processes.start("cpu"), data.load(quick.data))

    def test_its_rows_are_those_of_the_scorer(self, run, scored, evaluator):
        checkpoint = RunDir(run.output_dir).checkpoint(8)
        rows = evaluator(8, checkpoint.weights)
        for row in rows:
            expected = next(other for other in scored["rows"] if other["weights"] == row["weights"])
            assert row["frechet_distance_unbiased"] == pytest.approx(expected["frechet_distance_unbiased"], rel=1e-3)
            assert row["kid"] == pytest.approx(expected["kid"], rel=1e-3)
        assert len(rows) == 3

    def test_it_draws_from_no_generator_and_leaves_the_weights_alone(self, run, evaluator):
        checkpoint = RunDir(run.output_dir).checkpoint(8)
        held = {name: checkpoint.weights(name) for name in checkpoint.names}
        before = torch.random.get_rng_state()
        evaluator(8, lambda name: held[name])
        assert torch.equal(torch.random.get_rng_state(), before)
        torch.testing.assert_close(held["raw"], checkpoint.weights("raw"), rtol=0, atol=0)
