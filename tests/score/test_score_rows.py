"""A scoring's book-keeping: a row belongs to the bytes of its weights, to versions and device, and to the images it is of."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from scored import again, make_run, results, settings, start, weights

from ddpm_ema import config, data, metrics, sampling
from ddpm_ema.averaging import PowerFunction, write_snapshot
from ddpm_ema.averaging.files import save_tensors
from ddpm_ema.config import EvaluationSettings
from ddpm_ema.errors import StoppedError, UserError
from ddpm_ema.features import Architecture, Classifier, Trained, open_extractor, save_classifier
from ddpm_ema.metrics import Reference
from ddpm_ema.named_weights import WeightResolver
from ddpm_ema.rundir import RunDir, read_tensors
from ddpm_ema.score.feature_store import FeatureBatch, pixel_figures
from ddpm_ema.score.reference import noise_images, reading_of
from ddpm_ema.score.results import heading, table
from ddpm_ema.score.rows import RowBuilder

SETTINGS = {"evaluation__precision_recall": False}


def rewrite(run: config.Config, scale: float, snapshots: bool = False) -> None:
    """Step 8 of another training under the same names."""
    rundir = RunDir(run.output_dir)
    manifest = rundir.checkpoint(8).manifest
    files = {file: weights(0, scale + 0.1 * place) for place, file in enumerate(manifest["files"])}
    rundir.write_checkpoint(8, files, {key: manifest[key] for key in ("settings", "profiles")})
    for name, std in (("power_0_05", 0.05), ("power_0_10", 0.10)) if snapshots else ():
        rundir.snapshot_path(8, name).unlink()
        write_snapshot(rundir.snapshot_path(8, name), weights(0, scale), 8, PowerFunction(std=std))


def names(found: dict[str, Any], key: str = "rows") -> list[str]:
    return sorted(row["weights"] for row in found[key])


class TestWeights:
    def test_a_row_says_which_weights_which_versions_and_which_protocol_made_it(self, tmp_path: Path) -> None:
        run = make_run(tmp_path / "run", **SETTINGS)
        found = results(run)
        rundir = RunDir(run.output_dir)
        resolver = WeightResolver(rundir, rundir.checkpoint(8), run)
        for row in found["rows"]:
            assert row["weights_sha256"] == resolver.named(row["weights"]).key
            assert row["protocol"] == sampling.PROTOCOL
            assert set(row["versions"]) == {
                "ddpm_ema",
                "torch",
                "diffusers",
                "numpy",
                "timm",
                "torch-fidelity",
                "device",
            }
            assert row["versions"] == found["versions"]
        assert found["protocol"] == sampling.PROTOCOL
        assert found["finished"].endswith("+00:00")
        assert found["evaluation"] == config.to_dict(run)["evaluation"]

    def test_averages_of_a_former_training_are_never_beside_new_raw_weights_and_come_back_with_their_weights(
        self, tmp_path: Path, sampled: list[int]
    ) -> None:
        run = make_run(tmp_path / "run", **SETTINGS)
        before = results(again(run, evaluation__sweep={"stds": "0.05:0.15:2"}))
        assert names(before, "sweep") == ["power_0_05", "power_0_15"]
        shutil.copytree(run.output_dir / "checkpoints", tmp_path / "old")
        rewrite(run, 0.7, snapshots=True)
        alone = again(run, evaluation__weights=["raw"])
        found = results(alone)
        assert names(found) == ["raw"]
        assert found["may_be_best"] == ["raw"]
        assert "delta_vs_raw" not in found["rows"][0]
        assert "sweep" not in found
        shutil.rmtree(run.output_dir / "checkpoints")
        shutil.copytree(tmp_path / "old", run.output_dir / "checkpoints")
        sampled.clear()
        for row, once in zip(
            results(alone)["rows"], before["rows"], strict=True
        ):  # the sweep is gone from their family
            same = ("weights", "weights_sha256", "frechet_distance", "stderr", "seconds")
            assert [row[key] for key in same] == [once[key] for key in same]
        assert sampled == []

    def test_a_row_whose_weights_are_gone_is_left_out_and_said(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = make_run(tmp_path / "run", **SETTINGS, evaluation__weights=["raw", "raw@4"])
        assert names(results(run)) == ["raw", "raw@4"]
        shutil.rmtree(RunDir(run.output_dir).checkpoint(4).path)
        found = results(again(run, evaluation__weights=["raw"]))
        assert names(found) == ["raw"]
        assert "left out: raw@4" in capsys.readouterr().err

    def test_the_same_weights_under_two_names_are_sampled_once(self, tmp_path: Path, sampled: list[int]) -> None:
        found = results(make_run(tmp_path / "run", **SETTINGS, evaluation__weights=["raw", "raw@8"]))
        assert names(found) == ["raw", "raw@8"]
        assert len(sampled) == 60


class TestVersions:
    """Images of versions that are not those of this machine: the folder is made to say that others began it."""

    @staticmethod
    def folder(run: config.Config) -> Path:
        return min((run.output_dir / "scores").glob("00000008-*"), key=lambda path: len(path.name))

    def pretend(self, run: config.Config, other_images: bool = False, other_features: bool = False) -> None:
        path = self.folder(run) / "made_with.json"
        path.write_text(json.dumps([{**entry, "torch": "0.4.1"} for entry in json.loads(path.read_text())]))
        for first in self.folder(run).glob("weights/*/*-000000000-*"):
            tensors = read_tensors(first)
            if "images" in tensors:
                tensors["images"][3, 0, 0, 0] ^= other_images
            else:
                tensors["features"][3, 0] += other_features
            save_tensors(first, tensors)

    def test_where_the_first_16_images_come_out_the_same_a_scoring_goes_on_and_records_it(
        self, tmp_path: Path, sampled: list[int], capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = make_run(tmp_path / "run", **SETTINGS)
        first = results(again(run, evaluation__weights=["raw"]))
        self.pretend(run)
        sampled.clear()
        found = results(run)
        assert sampled[:16] == list(range(16))
        assert len(sampled) == 16 + 2 * 60
        assert next(row for row in found["rows"] if row["weights"] == "raw")["stderr"] == first["rows"][0]["stderr"]
        assert sum("delta_vs_raw" in row for row in found["rows"]) == 2
        assert [made["torch"] for made in json.loads((self.folder(run) / "made_with.json").read_text())] == [
            "0.4.1",
            str(torch.__version__),
        ]
        assert "its first images came out the same" in capsys.readouterr().err
        sampled.clear()
        results(run)
        assert sampled == [], "under versions that are known to be equal nothing is asked again"

    @pytest.mark.parametrize("other", ["images", "features"])
    def test_where_they_come_out_otherwise_the_old_rows_are_a_scoring_of_their_own(
        self, tmp_path: Path, other: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = make_run(tmp_path / "run", **SETTINGS)
        sweep = {"stds": "0.05:0.15:2"}
        before = results(again(run, evaluation__weights=["raw", "ema_0_9"], evaluation__sweep=sweep))
        self.pretend(run, other_images=other == "images", other_features=other == "features")
        found = results(again(run, evaluation__weights=["power_0_10"]))
        assert names(found) == ["power_0_10"], "never paired with what other versions made"
        aside = self.folder(run).with_name(f"{self.folder(run).name}.1")
        (table,) = aside.parent.glob(f"{aside.name}-*/results.json")
        old = json.loads(table.read_text())
        assert all(old[key] == before[key] for key in ("rows", "sweep", "may_be_best"))
        assert old["versions"]["torch"] == "0.4.1"
        assert any("torch 0.4.1" in warning for warning in old["warnings"])
        assert capsys.readouterr().err.count(aside.name) == 1

    @pytest.mark.parametrize("same", [True, False])
    def test_features_of_an_extractor_that_the_first_start_under_other_versions_left_out_are_checked_by_the_next(
        self, tmp_path: Path, same: bool, sampled: list[int]
    ) -> None:
        run = make_run(tmp_path / "run", **SETTINGS, evaluation__weights=["raw"])
        network = Classifier(Architecture(channels=1, image_size=8, num_classes=10, width=6, dim=12)).eval()
        save_classifier(tmp_path / "wide.safetensors", Trained(network, 0.1), fingerprint="none", seed=1)
        wide = again(run, evaluation__extractors=[f"classifier={tmp_path / 'wide.safetensors'}"])
        results(wide)
        self.pretend(run, other_features=not same)
        results(run)
        sampled.clear()
        found = results(again(wide, evaluation__weights=["ema_0_9"]))
        assert names(found) == (["ema_0_9", "raw"] if same else ["ema_0_9"])
        assert sampled[:16] == list(range(16))

    def test_a_folder_whose_versions_are_of_all_extractors_together_is_not_sampled_again_under_them(
        self, tmp_path: Path, sampled: list[int]
    ) -> None:
        run = make_run(tmp_path / "run", **SETTINGS, evaluation__weights=["raw"])
        before = results(run)
        (self.folder(run) / "made_with.json").write_text(json.dumps([before["versions"]]))
        sampled.clear()
        assert results(run)["rows"] == before["rows"]
        assert sampled == []

    @pytest.mark.parametrize("moves", [1, 2])
    def test_a_kill_while_they_are_moved_leaves_no_old_row_beside_new_images(
        self, tmp_path: Path, moves: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = make_run(tmp_path / "run", **SETTINGS)
        results(again(run, evaluation__weights=["raw", "ema_0_9"]))
        self.pretend(run, other_images=True)
        replace, moved = os.replace, []

        def killed(source: Path, target: Path) -> None:
            moved.extend([target] if f"{self.folder(run).name}.1" in str(target) else [])
            if len(moved) > moves:
                raise KeyboardInterrupt
            replace(source, target)

        alone = again(run, evaluation__weights=["raw"])
        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", killed)
            with pytest.raises(KeyboardInterrupt):
                results(alone)
        assert names(results(alone)) == ["raw"]

    @pytest.mark.parametrize("same", [True, False])
    def test_it_holds_in_the_middle_of_one_sets_images(
        self, tmp_path: Path, same: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = make_run(tmp_path / "run", **SETTINGS, evaluation__weights=["raw"])
        sample, rounds = sampling.sample, []

        def stopping(*arguments: Any, **options: Any) -> torch.Tensor:
            rounds.append(len(options["indices"]))
            if len(rounds) == 3:
                raise StoppedError("stopped")
            return sample(*arguments, **options)

        monkeypatch.setattr(sampling, "sample", stopping)
        with pytest.raises(StoppedError):
            results(run)
        self.pretend(run, other_images=not same)
        assert names(results(run)) == ["raw"]
        assert rounds == [16, 22, 22, 16, 22] if same else [16, 22, 22, 16, 16, 22, 22]

    def test_weights_that_cannot_be_sampled_again_are_taken_for_other_images(self, tmp_path: Path) -> None:
        run = make_run(tmp_path / "run", **SETTINGS)
        results(again(run, evaluation__weights=["raw"]))
        self.pretend(run)
        rewrite(run, 0.7)
        results(again(run, evaluation__weights=["raw"]))
        assert self.folder(run).with_name(f"{self.folder(run).name}.1").is_dir()

    def test_where_the_list_of_versions_is_lost_the_first_images_decide(self, tmp_path: Path) -> None:
        run = make_run(tmp_path / "run", **SETTINGS, evaluation__weights=["raw"])
        before = results(run)
        (self.folder(run) / "made_with.json").write_text("[")
        assert results(run)["rows"] == before["rows"]
        assert before["versions"].items() <= json.loads((self.folder(run) / "made_with.json").read_text())[-1].items()

    @pytest.mark.slow
    def test_all_ranks_agree(self, tmp_path: Path) -> None:
        run = make_run(tmp_path / "run", **SETTINGS)
        results(again(run, evaluation__weights=["raw"]))
        self.pretend(run, other_images=True)
        launch = start(again(run, evaluation__weights=["raw", "ema_0_9"]), world_size=2)
        assert launch.wait() == [0, 0], launch.output(0)
        folder = self.folder(run)
        assert folder.with_name(f"{folder.name}.1").is_dir()
        (table,) = folder.parent.glob(f"{folder.name}-*/results.json")
        assert names(json.loads(table.read_text())) == ["ema_0_9", "raw"]


def batch(features: torch.Tensor, images: torch.Tensor) -> FeatureBatch:
    """Features of images."""
    saturated, contrast = pixel_figures(images)
    indices = torch.arange(len(images))
    return FeatureBatch(indices=indices, features=features, saturated=saturated, contrast=contrast)


class TestPixels:
    def test_saturation_is_counted_over_all_samples_and_the_whole_reference(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = make_run(tmp_path / "run", **SETTINGS, evaluation__weights=["raw"])
        made: list[torch.Tensor] = []
        sample = sampling.sample
        monkeypatch.setattr(sampling, "sample", lambda *a, **o: made.append(sample(*a, **o)) or made[-1])
        found = results(run)

        def share(images: torch.Tensor) -> float:
            return float(((images == 0) | (images == 255)).double().mean())

        assert found["rows"][0]["saturated"] == pytest.approx(share(torch.cat(made)))
        whole = data.load(run.data)
        assert found["reference_saturated"] == pytest.approx(share(whole.batch(torch.arange(len(whole)))))
        shutil.rmtree(run.output_dir / "scores")
        assert results(run)["reference_saturated"] == found["reference_saturated"], "from the cache"

    def measured(self, images: torch.Tensor, features: torch.Tensor) -> list[str]:
        generator = torch.Generator().manual_seed(0)
        real = torch.randn(400, 2, generator=generator)
        settings = EvaluationSettings(groups=10, precision_recall=False)
        builder = RowBuilder(Reference(metrics.statistics_of(real), {}, real), settings, torch.device("cpu"))
        return list(builder.build(batch(features, images), "raw", {}).row["warnings"])

    def test_samples_that_are_constant_or_all_alike_are_warned_of(self) -> None:
        generator = torch.Generator().manual_seed(1)
        images = torch.randint(1, 255, (100, 1, 10, 10), generator=generator, dtype=torch.uint8)
        features = torch.randn(100, 2, generator=generator)
        assert self.measured(images, features) == []
        (text,) = self.measured(images // 128 + 100, features)
        assert "100% of these samples are of one colour" in text
        (text,) = self.measured(images, features / 50 + 1)
        assert "nearly all alike" in text


class TestPrecisionOfNoise:
    def test_radii_are_computed_where_precision_is_asked_for_alone_without_reading_the_reference_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls: list[int] = []
        radii = metrics.neighbour_radii
        monkeypatch.setattr(metrics.reference, "neighbour_radii", lambda some: calls.append(len(some)) or radii(some))
        run = make_run(tmp_path / "run", evaluation__weights=["raw"], data__held_out=0.1)
        without, whole = again(run, **SETTINGS), len(data.load(run.data))
        assert results(without)["precision_of_noise"] is None
        assert calls == []
        monkeypatch.setattr("ddpm_ema.score.reference._features", None)  # reads images
        assert results(run)["precision_of_noise"] is not None
        assert {"precision", "recall"} <= results(run)["rows"][0].keys()
        assert calls == [whole], "once, and of the reference alone"
        assert results(without)["precision_of_noise"] is None

    def test_it_is_the_share_of_noise_images_that_lie_near_real_ones(self, tmp_path: Path) -> None:
        run = make_run(tmp_path / "run", evaluation__weights=["raw"])
        found = results(run)
        images = noise_images((1, 8, 8))
        assert images.shape == (256, 1, 8, 8)
        assert 100 < images.double().mean() < 155
        assert images.unique().numel() == 256
        extractor = open_extractor("classifier", run.output_dir)
        whole = data.load(run.data)
        real, noise = (extractor(x) for x in (whole.batch(torch.arange(len(whole))), images))
        assert found["precision_of_noise"] == metrics.inside(noise, real, metrics.neighbour_radii(real)).double().mean()

    def test_where_noise_reaches_a_tenth_the_table_leaves_precision_out(self, tmp_path: Path) -> None:
        reached = results(make_run(tmp_path / "run", evaluation__weights=["raw"])) | {"precision_of_noise": 0.1}
        assert "precision" not in table(reached).splitlines()[0]
        below = reached | {"precision_of_noise": 0.09}
        assert "precision" in table(below).splitlines()[0]

    def test_it_is_warned_of_in_results_json(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("ddpm_ema.metrics.reference.inside", lambda *_: torch.tensor([0.97], dtype=torch.float64))
        found = results(make_run(tmp_path / "run", evaluation__weights=["raw"]))
        assert found["precision_of_noise"] == pytest.approx(0.97)
        assert any("uniform noise" in text and "0.97" in text for text in found["warnings"])


def test_the_heading_names_sampler_steps_images_and_reference(tmp_path: Path) -> None:
    found = results(make_run(tmp_path / "run", **SETTINGS, evaluation__weights=["raw"]))
    assert (
        heading(found)
        == "step 8, ddim 4 steps, 60 images per row, against these training images (train of digits, 1797 images)"
    )
    changed = found | {"num_inference_steps": 9, "eta": 0.5, "clip_sample": False}
    assert "ddim 9 steps, eta 0.5, x_0 not clipped, 60" in heading(changed)


@pytest.mark.parametrize(
    ("reference", "split", "reading"),
    [
        ("train", "train", "training images"),
        ("train", "train[:90%]", "training images"),
        ("train[90%:]", "train[:90%]", "images"),
        ("train+test", "train", "images"),
        ("test", "train", "population"),
        ("held_out", "train", "population"),
        ("statistics.npz", "train", "images"),
    ],
)
def test_only_images_that_nobody_trained_on_stand_for_their_population(
    tmp_path: Path, reference: str, split: str, reading: str
) -> None:
    held_out = {"data__held_out": 0.1} if reference == "held_out" else {}
    run = settings(tmp_path, evaluation__reference=reference, data__split=split, **held_out)
    assert reading_of(run) == reading


def test_against_held_out_images_the_reference_is_left_out_in_groups_too(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", **SETTINGS, evaluation__weights=["raw"])
    (alone,) = results(run)["rows"]
    held_out = make_run(
        tmp_path / "held", **SETTINGS, evaluation__weights=["raw"], data__held_out=0.2, evaluation__reference="held_out"
    )
    found = results(held_out)
    assert found["reading"] == "population"
    assert "against the population of which the reference is a sample (held_out of digits" in heading(found)
    (record,) = (json.loads(path.read_text()) for path in held_out.output_dir.glob("scores/*/weights/*.json"))
    assert [len(side["counts"]) for side in record["estimates"]["60"]["sides"]] == [10, 10]
    assert found["rows"][0]["stderr"] > alone["stderr"]


class TestFullDisk:
    @pytest.fixture
    def mount(self) -> Iterator[Callable[..., None]]:
        """Mounts a file system of some size on a folder, or gives it another size."""
        mounted: list[Path] = []

        def mount(folder: Path, size: str) -> None:
            options = f"remount,size={size}" if folder in mounted else f"size={size}"
            folder.mkdir(parents=True, exist_ok=True)
            if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]).returncode:
                pytest.skip("mounting a small file system needs root")
            mounted.append(folder)

        yield mount
        for folder in set(mounted):
            subprocess.run(["umount", "-l", folder], check=True)

    # Room for the lock alone; for some blocks of the first weights; for the scores, and not for the grid.
    @pytest.mark.parametrize("size", ["4k", "36k", "60k"])
    def test_it_is_one_message_and_a_scoring_goes_on_when_there_is_room(
        self, tmp_path: Path, mount: Callable[..., None], size: str
    ) -> None:
        run = make_run(tmp_path / "run", **SETTINGS)
        mount(run.output_dir / "scores", size)
        with pytest.raises(UserError, match=r"the disk is full: [\d,]+ bytes needed, [\d,]+ free|No space left"):
            results(run)
        left = [path.name for path in (run.output_dir / "scores").rglob("*") if path.is_file()]
        assert not [name for name in left if not name.endswith((".json", ".safetensors", ".lock"))], left
        mount(run.output_dir / "scores", "4m")
        assert len(results(run)["rows"]) == 3

    @pytest.mark.slow
    def test_every_rank_ends_with_it(self, tmp_path: Path, mount: Callable[..., None]) -> None:
        run = make_run(tmp_path / "run", **SETTINGS)
        mount(run.output_dir / "scores", "36k")
        launch = start(run, world_size=2)
        assert launch.wait() == [2, 2]
        assert "the disk is full" in launch.output(0)
        assert "Traceback" not in launch.output(0) + launch.output(1)
