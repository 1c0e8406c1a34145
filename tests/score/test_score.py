"""Scoring: what a name means, what a row says, and what does and does not change the numbers."""

from __future__ import annotations

import gc
import io
import json
import shutil
import warnings
import weakref

import pytest
import torch
from PIL import Image
from scored import again, figures, make_run, results, settings, weights
from tqdm import TqdmWarning, tqdm

from ddpm_ema import data, diffusion, metrics, model, sampling, score
from ddpm_ema.distributed import Processes
from ddpm_ema.errors import UserError
from ddpm_ema.features import open_extractor
from ddpm_ema.rundir import RunDir
from ddpm_ema.score import studio
from ddpm_ema.score.blocks import Block, DiskStore
from ddpm_ema.score.network import Network
from ddpm_ema.score.results import settings_of, table
from ddpm_ema.score.studio import even_batch, rounds


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("score") / "run")


@pytest.fixture(scope="module")
def scored(run):
    return results(run)


def network_of(run):
    return Network(model.build(run), run.evaluation, torch.device("cpu"), batch_size=4)


class TestTheWholeWay:
    def test_every_copy_gets_a_row_from_the_best_to_the_worst(self, run, scored):
        on_disk = json.loads(next((run.output_dir / "scores").glob("00000008-*/results.json")).read_text())
        assert on_disk["rows"] == scored["rows"]
        assert {row["weights"] for row in scored["rows"]} == {"raw", "ema_0_9", "power_0_10"}
        distances = [row["frechet_distance_unbiased"] for row in scored["rows"]]
        assert distances == sorted(distances)
        for key in ("schema", "step", "metric", "extractor", "extractor_sha256", "reference", "num_images", "sampler"):
            assert key in scored
        assert (scored["schema"], scored["step"], scored["metric"]) == (2, 8, "fd")

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
        extractor = open_extractor(evaluation, run.output_dir)
        real = data.load(run.data).batch(torch.arange(1797))
        ours, theirs = (metrics.statistics_of(extractor(x)["features"]) for x in (images, real))
        row = next(row for row in scored["rows"] if row["weights"] == "raw")
        assert row["frechet_distance"] == pytest.approx(metrics.frechet_distance(ours, theirs), rel=1e-3)

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
        assert {frozenset((pair["a"], pair["b"])) for pair in scored["pairs"]} == {
            frozenset(pair) for pair in (("raw", "ema_0_9"), ("raw", "power_0_10"), ("ema_0_9", "power_0_10"))
        }

    def test_the_grid_shows_a_labelled_row_a_copy(self, run, scored):
        with Image.open(next((run.output_dir / "scores").glob("00000008-*/grid.png"))) as grid:
            assert grid.height > 3 * 48
            assert grid.width > 5 * 48

    def test_a_complete_scoring_says_so_and_redoes_nothing(self, run, scored, capsys, monkeypatch):
        monkeypatch.setattr(sampling, "sample", None)  # calling it would be an error
        again_scored = results(run)
        assert "already complete" in capsys.readouterr().err
        assert again_scored["rows"] == scored["rows"]

    def test_copies_scored_earlier_stay_in_the_table(self, run, scored):
        found = results(again(run, evaluation__weights=["raw@4"]))
        assert {row["weights"] for row in found["rows"]} == {"raw@4", "raw", "ema_0_9", "power_0_10"}

    def test_every_checkpoint_is_scored_where_all_are_asked_for(self, run):
        found = score.run(again(run, evaluation__steps="all", evaluation__weights=["raw"]))
        assert [result["step"] for result in found] == [4, 8]
        assert found[0]["rows"] != found[1]["rows"]

    def test_figures_are_sorted_and_told_apart_in_the_printed_table(self, scored):
        lines = table(scored).splitlines()
        assert "FD (classifier)" in lines[0]
        assert [line.split()[0] for line in lines[1:]] == [row["weights"] for row in scored["rows"]]
        assert sum(word in " ".join(lines) for word in ("better", "worse", "not significant")) >= 1


class TestWhatChangesTheNumbers:
    @pytest.mark.parametrize("batch_size", [16, 50])
    def test_the_batch_size_does_not(self, tmp_path, scored, batch_size):
        run = make_run(tmp_path / "run", evaluation__batch_size=batch_size)
        found = results(run)
        assert found["settings_digest"] == scored["settings_digest"]
        for name, numbers in figures(scored).items():
            # A pixel on the edge between two levels may round either way in another batch.
            assert figures(found)[name] == pytest.approx(numbers, rel=0.01)

    def test_only_settings_that_change_the_numbers_name_the_folder(self, run):
        extractor = open_extractor(run.evaluation, run.output_dir)
        origin = {"data": "f", "versions": {"torch": "1"}}

        def digest(**changes):
            return settings_of(again(run, **changes), extractor, origin)

        for same in (
            {"evaluation__batch_size": 7},
            {"evaluation__grid_images": 2},
            {"evaluation__weights": ["raw"]},
            {"evaluation__extractor_batch_size": 3},
            {"model__dropout": 0.5},
            {"diffusion__min_snr_gamma": 5.0},
            {"training__steps": 9},
            {"evaluation__eta": 0.5, "evaluation__sampler": "ddpm"},
        ):
            reference = digest(**({"evaluation__sampler": "ddpm"} if "evaluation__sampler" in same else {}))
            assert digest(**same) == reference
        for other in (
            {"evaluation__seed": 1},
            {"evaluation__num_inference_steps": 5},
            {"evaluation__eta": 0.5},
            {"evaluation__num_images": 61},
            {"evaluation__mixed_precision": "bf16"},
            {"evaluation__groups": 12},
            {"evaluation__clip_sample": False},
            {"diffusion__schedule": "cosine"},
            {"diffusion__prediction": "v_prediction"},
            {"diffusion__variance": "fixed_small"},
            {"model__attention_head_dim": 2},
            {"data__channels": 3},
        ):
            assert digest(**other) != digest()

    def test_other_weights_under_the_same_name_are_scored_anew(self, tmp_path):
        run = make_run(tmp_path / "run", evaluation__weights=["raw"])
        first = results(run)
        checkpoint = RunDir(run.output_dir).checkpoint(8)
        files = {"raw.safetensors": weights(0, 0.8)}
        RunDir(run.output_dir).write_checkpoint(8, files, {"settings": checkpoint.manifest["settings"], "profiles": {}})
        second = results(run)
        assert [row["weights"] for row in second["rows"]] == ["raw"]
        assert second["rows"][0]["frechet_distance"] != first["rows"][0]["frechet_distance"]


class TestWeights:
    def test_an_ensemble_averages_predictions_not_weights(self, run):
        network = network_of(run)
        x_t, t = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.full((4,), 50)
        first, second = weights(0), weights(1)
        alone = []
        for members in (first, second):
            network.load([members], "one")
            alone.append(network.predict(x_t, t, None))
        network.load([first, second], "both")
        torch.testing.assert_close(network.predict(x_t, t, None), (alone[0] + alone[1]) / 2)
        network.load([first], "one")
        torch.testing.assert_close(network.predict(x_t, t, None), alone[0])

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

    def test_weights_of_another_model_are_refused_tensor_by_tensor(self, run):
        network = network_of(run)
        broken = weights()
        broken["conv_in.weight"] = torch.zeros(3, 3)
        del broken["conv_out.bias"]
        with pytest.raises(UserError, match=r"lacks conv_out.bias; conv_in.weight is \[3, 3\], the model's is"):
            network.load([broken], "ema")

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

    def test_guidance_of_a_model_without_classes_is_an_error(self, run):
        with pytest.raises(UserError, match="class-conditional"):
            network_of(again(run, evaluation__guidance_scale=2.0))


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


class TestPieces:
    def test_shares_are_even_and_whole(self):
        for num_images, world, most in ((1797, 2, 256), (50_000, 8, 250), (7, 3, 256), (1, 1, 1), (513, 2, 256)):
            batch = even_batch(num_images, world, most)
            parts = list(rounds(list(range(num_images)), world * batch))
            assert [index for part in parts for index in part] == list(range(num_images))
            assert batch <= most
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
            assert len(parts) == -(-num_images // (world * most))

    def test_shares_that_add_up_to_more_by_rounding_do_not_take_the_bar_past_its_end(self):
        with tqdm(total=1797, disable=False, file=io.StringIO()) as bar, warnings.catch_warnings():
            warnings.simplefilter("error", TqdmWarning)
            for _ in range(15):
                studio._advance(bar, 1797 / 15 * (1 + 1e-12))
                bar.refresh()
            assert bar.n == 1797

    def test_compiled_networks_see_one_batch_size_only(self, run, monkeypatch):
        """Fewer images are filled up, and what was filled in is cut off again."""
        seen = []

        def compiled(function, **options):
            def call(x_t, timesteps, labels):
                seen.append(len(x_t))
                return function(x_t, timesteps, labels)

            return call

        monkeypatch.setattr(torch, "compile", compiled)
        eager = network_of(run)
        filled = network_of(again(run, evaluation__compile=True))
        x_t = torch.linspace(-1, 1, 3 * 64).reshape(3, 1, 8, 8)
        made = filled.predict(x_t, torch.full((3,), 9), None)
        torch.testing.assert_close(made, eager.predict(x_t, torch.full((3,), 9), None))
        assert seen == [4]

    def test_blocks_come_back_as_they_were_kept(self, tmp_path):
        blocks = [_block([3, 4]), _block([0, 1, 2])]
        store = DiskStore(tmp_path)
        for block in blocks:
            store.add(block)
        whole = DiskStore(tmp_path).block(5)
        assert whole.indices.tolist() == [0, 1, 2, 3, 4]
        assert whole.features[:, 0].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
        assert whole.saturated.tolist() == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
        assert whole.seconds == 2.0
        part = DiskStore(tmp_path).block(4)
        assert part.indices.tolist() == [0, 1, 2, 3]
        assert part.contrast.tolist() == [0, 1, 2, 3]
        assert part.seconds == 1.5

    def test_joining_holds_one_block_beside_the_result(self, tmp_path, monkeypatch):
        for start in (0, 2, 4):
            DiskStore(tmp_path).add(_block([start, start + 1]))
        store, read, alive = DiskStore(tmp_path), Block.read, []

        def reading(path):
            gc.collect()
            assert sum(block() is not None for block in alive) <= 1, "the last one is let go when the next is there"
            block = read(path)
            alive.append(weakref.ref(block))
            return block

        monkeypatch.setattr(Block, "read", reading)
        assert len(store.block(6)) == 6
        assert len(alive) == 3

    @pytest.mark.parametrize("harm", ["truncate", "pickle", "repeat", "nan"])
    def test_a_damaged_block_is_named_and_left_out(self, tmp_path, harm, capsys):
        store = DiskStore(tmp_path)
        store.add(_block([0, 1]))
        store.add(_block([2, 3]))
        bad = sorted(tmp_path.glob("block-*"))[1]
        if harm == "truncate":
            bad.write_bytes(bad.read_bytes()[:-3])
        elif harm == "pickle":
            torch.save({"indices": torch.tensor([2, 3])}, bad)
        elif harm == "repeat":
            bad.write_bytes(sorted(tmp_path.glob("block-*"))[0].read_bytes())
        else:
            block = _block([2, 3])
            block.features[1, 0] = float("nan")
            bad.unlink()
            store.add(block)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert DiskStore(tmp_path).done() == {0, 1}
        assert not bad.exists()
        assert bad.name in capsys.readouterr().err


def _block(indices: list[int]) -> Block:
    numbers = torch.tensor(indices)
    none = torch.zeros(0, dtype=torch.int64)
    images = torch.zeros(0, 1, 8, 8, dtype=torch.uint8)
    features = numbers.float()[:, None].expand(-1, 3).contiguous()
    return Block(numbers, features, None, numbers / 10, numbers.to(torch.uint8), none, images, seconds=1.0)
