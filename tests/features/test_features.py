"""Extractors: the classifier and its training, weights checked before they are opened, and agreement with torch-fidelity."""

import hashlib
import os
import pickle
from pathlib import Path
from typing import Any

import fidelity
import pytest
import torch
from oracles import frechet_distance
from pickled import Bomb
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor
from torch_fidelity import calculate_metrics
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from ddpm_ema import classifier_training, config, metrics
from ddpm_ema.errors import UserError
from ddpm_ema.features import (
    Extractor,
    inception,
    open_extractor,
    read_metadata,
    save_classifier,
    train_classifier,
)
from ddpm_ema.features.classifier import Architecture, Classifier, Trained, load_classifier


def digits() -> tuple[Tensor, Tensor]:
    """uint8 [1797, 1, 8, 8] and labels."""
    data = load_digits()
    return torch.from_numpy(data.images * (255 / 16)).round().to(torch.uint8)[:, None], torch.from_numpy(data.target)


@pytest.fixture(scope="module")
def trained_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with a classifier of digits, trained a quarter as long as usual."""
    folder = tmp_path_factory.mktemp("run")
    images, labels = digits()
    trained = train_classifier(images, labels, seed=0, visits=8000)
    save_classifier(folder / "features.safetensors", trained, fingerprint="digits", seed=0)
    return folder


@pytest.fixture
def extractor(trained_folder: Path) -> Extractor:
    return open_extractor("classifier", trained_folder)


class TestClassifier:
    def test_it_learns_the_digits(self, trained_folder: Path) -> None:
        assert read_metadata(trained_folder / "features.safetensors")["accuracy"] > 0.9

    def test_the_same_seed_gives_the_same_weights_and_leaves_the_global_generators_alone(self) -> None:
        images, labels = digits()
        before = torch.get_rng_state()
        a, b, c = (
            train_classifier(images[:60], labels[:60], seed=s, visits=200).network.state_dict() for s in (1, 1, 2)
        )
        assert torch.equal(torch.get_rng_state(), before)
        assert all(torch.equal(a[name], b[name]) for name in a)
        assert not all(torch.equal(a[name], c[name]) for name in a)

    def test_its_features_see_more_than_the_class(self, extractor: Extractor) -> None:
        images, _ = digits()
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))

        def distance(a: Tensor, b: Tensor) -> float:
            return frechet_distance(metrics.statistics_of(a), metrics.statistics_of(b))

        def features(pixels: Tensor) -> Tensor:
            return extractor(pixels)

        halves = distance(features(images[order[:898]]), features(images[order[898:]]))
        blurred = ((images.float() + images.roll(1, -1).float()) / 2).round().to(torch.uint8)
        assert distance(features(images.roll(1, -1)), features(images)) > 20 * halves
        assert distance(features(blurred), features(images)) > 5 * halves
        # Class means span 9 dimensions; without the thumbnail they hold 98% of the variance.
        spectrum = torch.linalg.eigvalsh(metrics.statistics_of(features(images)).sigma).flip(0)
        assert float(spectrum[:9].sum() / spectrum.sum()) < 0.95

    def test_features_have_unit_variance_over_the_training_set(self, extractor: Extractor) -> None:
        features = extractor(digits()[0])
        assert features.shape == (1797, 64)
        assert features.var(dim=0).mean() == pytest.approx(1, abs=0.05)
        assert features.mean(dim=0).abs().max() < 0.05

    @pytest.mark.parametrize(("size", "channels"), [(9, 3), (16, 1), (32, 3), (65, 3)])
    def test_any_size_and_grey_or_colour_will_do(self, size: int, channels: int) -> None:
        network = Classifier(Architecture(channels, size, 4)).eval()
        for given in (1, 3):
            images = torch.randint(0, 256, (2, given, size, size), dtype=torch.uint8)
            features, logits = network(images)
            assert features.shape == (2, 64)
            assert logits.shape == (2, 4)

    def test_too_few_images_or_classes_are_an_error(self) -> None:
        images, labels = digits()
        with pytest.raises(UserError, match="20 images and 2 classes at least: 19 and 10 here"):
            train_classifier(images[:19], labels[:19], seed=0, num_classes=10)
        with pytest.raises(UserError, match="50 and 1 here"):
            train_classifier(images[:50], torch.zeros(50, dtype=torch.int64), seed=0)

    @pytest.mark.parametrize("damage", ["absent", "empty", "truncated", "pickle", "foreign", "misshaped"])
    def test_an_unusable_file_is_a_message_that_names_it_and_the_script(self, tmp_path: Path, damage: str) -> None:
        path = tmp_path / "features.safetensors"
        network = Classifier(Architecture(1, 8, 10))
        save_classifier(path, Trained(network, 1.0), fingerprint="x", seed=0)
        if damage == "absent":
            path.unlink()
        elif damage == "empty":
            path.write_bytes(b"")
        elif damage == "truncated":
            path.write_bytes(path.read_bytes()[:-100])
        elif damage == "pickle":
            path.write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
        elif damage == "foreign":
            save_file({"weight": torch.zeros(2)}, path)
        else:
            network.logits = torch.nn.Linear(64, 11)
            save_classifier(path, Trained(network, 1.0), fingerprint="x", seed=0)
        with pytest.raises(UserError, match=r"(?s)features\.safetensors.*ddpm-ema features"):
            open_extractor("classifier", tmp_path)
        assert not (tmp_path / "exploded").exists()


def write_images(folder: Path, per_class: int, classes: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for label in range(classes):
        (folder / f"class{label}").mkdir(parents=True, exist_ok=True)
        for i in range(per_class):
            pixels = torch.randint(0, 100, (8, 8), generator=generator, dtype=torch.uint8) + 100 * label
            Image.fromarray(pixels.numpy()).save(folder / f"class{label}" / f"{i}.png")


def settings(folder: Path, output: Path, **more: Any) -> config.Config:
    data = {"source": "folder", "path": str(folder), "image_size": 8, "channels": 1, "cache_dir": str(output / "cache")}
    return config.validate({"output_dir": str(output), "data": data, "machine": {"device": "cpu"}, **more})


class TestTrainFeatures:
    def test_done_already_it_says_so_and_redoes_nothing(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write_images(tmp_path / "images", 15, 2)
        path = classifier_training.train_features(settings(tmp_path / "images", tmp_path / "run"))
        first, stamp = path.read_bytes(), path.stat().st_mtime_ns
        assert "images it never saw" in capsys.readouterr().err
        assert classifier_training.train_features(settings(tmp_path / "images", tmp_path / "run")) == path
        assert "already complete" in capsys.readouterr().err
        assert path.stat().st_mtime_ns == stamp
        os.remove(path)
        classifier_training.train_features(settings(tmp_path / "images", tmp_path / "run"))
        assert path.read_bytes() == first

    @pytest.mark.slow
    def test_other_data_or_another_seed_trains_anew_and_says_so(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write_images(tmp_path / "images", 15, 2)
        path = classifier_training.train_features(settings(tmp_path / "images", tmp_path / "run"))
        first = path.read_bytes()
        classifier_training.train_features(settings(tmp_path / "images", tmp_path / "run", seed=1))
        write_images(tmp_path / "images", 15, 2, seed=5)
        classifier_training.train_features(settings(tmp_path / "images", tmp_path / "run", seed=1))
        assert capsys.readouterr().err.count("training it anew") == 2
        assert path.read_bytes() != first

    @pytest.mark.parametrize("folder", ["images", "images/class0"])
    def test_one_class_or_none_learns_which_way_up(
        self, tmp_path: Path, folder: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write_images(tmp_path / "images", 20, 1)
        path = classifier_training.train_features(settings(tmp_path / folder, tmp_path / "run"))
        assert "by which way up they are, accuracy" in capsys.readouterr().err
        assert classifier_training.train_features(settings(tmp_path / folder, tmp_path / "run")) == path
        assert load_classifier(path)[0](torch.zeros(3, 1, 8, 8))[0].shape == (3, 64)

    def test_large_images_are_fewer(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def train(images: torch.Tensor, labels: torch.Tensor, **_: Any) -> None:
            raise UserError(f"{len(images)} and {len(labels)}")

        write_images(tmp_path / "images", 15, 2)
        monkeypatch.setattr(classifier_training, "train_classifier", train)
        monkeypatch.setattr(classifier_training, "MOST_BYTES", 22 * 8 * 8)
        with pytest.raises(UserError, match=r"^22 and 22$"):
            classifier_training.train_features(settings(tmp_path / "images", tmp_path / "run"))

    def test_without_labels_it_tells_most_turns_of_digits_it_never_saw(self) -> None:
        images, _ = digits()
        trained = train_classifier(images[:600], None, seed=0, visits=6000)
        assert trained.accuracy > 0.6, "a guess is right in a quarter"


class TestExtractor:
    def test_batches_change_nothing_but_rounding(self, extractor: Extractor) -> None:
        images, _ = digits()
        whole = extractor(images[:100])
        extractor.batch_size = 7
        parts = extractor(images[:100])
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)

    def test_autocast_and_tf32_outside_do_not_reach_inside_and_come_back(self, extractor: Extractor) -> None:
        seen = []

        class Spy(torch.nn.Module):
            def forward(self, images: Tensor) -> tuple[Tensor]:
                switches = (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
                seen.append((*switches, torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu")))
                return (images.flatten(1).float(),)

        plain = {"name": "spy", "sha256": "", "feature_layer": "x", "channels": 1, "is_published_inception": False}
        images = digits()[0][:50]
        expected = extractor(images)
        before = (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)
        try:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
            with torch.autocast("cpu", torch.bfloat16):
                found = extractor(images)
                Extractor(network=Spy(), device=torch.device("cpu"), batch_size=50, **plain)(images)  # type: ignore[arg-type]
            assert torch.backends.cuda.matmul.allow_tf32
            assert torch.backends.cudnn.allow_tf32
        finally:
            torch.set_float32_matmul_precision(before[0])
            torch.backends.cudnn.allow_tf32 = before[1]
        assert seen[-1] == (False, False, "highest", False)
        assert torch.equal(found, expected)
        assert not found.requires_grad

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_on_a_gpu_with_tf32_allowed_features_and_distances_are_those_of_the_cpu(
        self, trained_folder: Path, extractor: Extractor
    ) -> None:
        images, _ = digits()
        expected = extractor(images)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        found = open_extractor("classifier", trained_folder, "cuda")(images)
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)
        statistics, indices = metrics.statistics_of(expected[900:]), torch.arange(900)
        on_cpu, on_gpu = (
            metrics.estimate_distance(
                features[:900], indices, 20, metrics.FrechetReference(statistics, features.device)
            )
            for features in (expected, expected.cuda())
        )
        assert on_gpu.unbiased == pytest.approx(on_cpu.unbiased, rel=1e-9)
        assert on_gpu.stderr == pytest.approx(on_cpu.stderr, rel=1e-8)

    def test_it_names_its_weights_by_their_sha256_and_is_no_fid(self, extractor: Extractor) -> None:
        assert extractor.name == "classifier"
        assert len(extractor.sha256) == 64
        assert not extractor.is_published_inception

    def test_an_unknown_name_is_an_error_with_the_nearest(self, tmp_path: Path) -> None:
        with pytest.raises(
            UserError, match="no extractor is called 'inception-v3'; did you mean 'inception-v3-compat'"
        ):
            open_extractor("inception-v3", tmp_path)
        with pytest.raises(UserError, match="known here: classifier, inception-v3-compat, timm:NAME"):
            open_extractor("qqq", tmp_path)

    def test_a_classifier_of_another_file_is_named_after_it_and_is_another_extractor(
        self, trained_folder: Path
    ) -> None:
        network = Classifier(Architecture(1, 8, 10, dim=16))
        save_classifier(trained_folder / "wide.safetensors", Trained(network, 0.1), fingerprint="x", seed=0)
        ours, other = (
            open_extractor(entry, trained_folder)
            for entry in ("classifier", f"classifier={trained_folder}/wide.safetensors")
        )
        assert (ours.label, other.label) == ("classifier", "classifier wide")
        assert (ours.name, ours.dim, other.dim) == (other.name, 64, 16)
        assert ours.key != other.key

    def test_other_input_is_refused(self, extractor: Extractor) -> None:
        for bad in (
            torch.zeros(2, 1, 8, 8),
            torch.zeros(2, 4, 8, 8, dtype=torch.uint8),
            torch.zeros(8, 8, dtype=torch.uint8),
        ):
            with pytest.raises(ValueError, match="images must be uint8"):
                extractor(bad)


class TestInception:
    @pytest.fixture(autouse=True)
    def hub(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """An empty hub folder, and a proxy at which nobody listens: a machine without a network."""
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            monkeypatch.setenv(name, "http://127.0.0.1:9")
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        return tmp_path / "torch" / "hub" / "checkpoints"

    def test_missing_weights_and_no_network_say_where_what_and_how(self, hub: Path) -> None:
        with pytest.raises(UserError) as caught:
            open_extractor("inception-v3-compat", hub)
        message, file = str(caught.value), inception.where_inception_lies()
        assert file.parent == hub
        assert inception.SHA256.startswith(file.stem.rpartition("-")[2])
        for part in (str(file), "https://", inception.SHA256, "inception-v3-compat=FILE", "refused"):
            assert part in message
        assert not list(hub.glob("*")), "half a download was left behind"

    @pytest.mark.parametrize("by_path", [False, True])
    def test_a_file_with_the_wrong_sha256_is_refused_and_never_unpickled(
        self, hub: Path, tmp_path: Path, by_path: bool
    ) -> None:
        path = tmp_path / "inception.pth" if by_path else inception.where_inception_lies()
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(Bomb(tmp_path / "exploded"), path)
        with pytest.raises(UserError, match=f"not the published {inception.SHA256}.*It was not opened"):
            open_extractor(f"inception-v3-compat={path}" if by_path else "inception-v3-compat", tmp_path)
        assert not (tmp_path / "exploded").exists()
        with pytest.raises(RuntimeError):  # the bomb is a real one
            raise RuntimeError(torch.load(path, weights_only=False))
        assert (tmp_path / "exploded").exists()

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"none\.safetensors: No such file"):
            open_extractor(f"inception-v3-compat={tmp_path}/none.safetensors", tmp_path)

    def test_weights_of_another_network_are_a_message(self, tmp_path: Path) -> None:
        save_file({"weight": torch.zeros(2)}, tmp_path / "w.safetensors")
        with pytest.raises(UserError, match=r"w\.safetensors cannot be loaded: .*Missing key(?!.{400})"):
            open_extractor(f"inception-v3-compat={tmp_path}/w.safetensors", tmp_path)


def as_png(images: Tensor, folder: Path) -> str:
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy()).save(folder / f"{i:05d}.png")
    return str(folder)


def theirs(fake: str, real: str, name: str, path: Path, subset: int) -> dict[str, float]:
    """torch-fidelity's own figures, from files."""
    common = {"cuda": False, "cache": False, "verbose": False, "save_cpu_ram": True, "rng_seed": 3}
    what = {"fid": True, "kid": True, "isc": True, "prc": True, "kid_subset_size": subset, "kid_subsets": 10}
    return calculate_metrics(
        input1=fake, input2=real, feature_extractor=name, feature_extractor_weights_path=str(path), **what, **common
    )


def agree(extractor: Extractor, fake: Tensor, real: Tensor, expected: dict[str, float], subset: int) -> None:
    """Ours in memory against theirs from PNGs."""
    features, reference = extractor(fake), extractor(real)
    fid = expected["frechet_inception_distance"]
    assert frechet_distance(metrics.statistics_of(features), metrics.statistics_of(reference)) == pytest.approx(
        fid, rel=1e-6
    )
    fast = metrics.FrechetReference(metrics.statistics_of(reference))
    estimate = metrics.estimate_distance(features, torch.arange(len(features)), 10, fast)
    assert estimate.plain == pytest.approx(fid, rel=1e-6)
    groups = torch.arange(len(features)) % 10
    kid = metrics.KernelReference(reference, 10).estimate(features, groups)
    # Theirs is a mean over ten subsets of as many images, or fewer: the same where each subset is all of them.
    spread = expected["kernel_inception_distance_std"] if subset < len(reference) else 0.0
    assert kid.plain == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-4, abs=2 * spread + 1e-9)
    radii = metrics.neighbour_radii(reference)
    found = (
        metrics.precision(features, groups, reference, radii).plain,
        metrics.recall(features, groups, reference).plain,
    )
    assert found == pytest.approx((expected["precision"], expected["recall"]), abs=1e-6)


class TestAgainstTorchFidelity:
    @pytest.mark.slow
    def test_on_inception_with_random_weights_they_are_too_and_it_is_no_fid(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = random_inception(tmp_path, monkeypatch)
        extractor = open_extractor(f"inception-v3-compat={path.with_suffix('.safetensors')}", tmp_path)
        assert not extractor.is_published_inception
        assert (extractor.dim, extractor.feature_layer) == (2048, "2048")
        generator = torch.Generator().manual_seed(0)
        fake = torch.randint(0, 200, (24, 3, 32, 32), generator=generator, dtype=torch.uint8)
        real = torch.randint(30, 256, (32, 3, 32, 32), generator=generator, dtype=torch.uint8)
        expected = theirs(as_png(fake, tmp_path / "a"), as_png(real, tmp_path / "b"), "inception-v3-compat", path, 16)
        agree(extractor, fake, real, expected, 16)

    @pytest.mark.slow
    def test_published_weights_make_it_a_fid_and_grey_images_become_rgb(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = random_inception(tmp_path, monkeypatch)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        monkeypatch.setattr(inception, "SHA256", sha256)
        extractor = open_extractor(f"inception-v3-compat={path}", tmp_path)
        assert extractor.is_published_inception
        assert extractor.sha256 == sha256
        grey = torch.randint(0, 256, (2, 1, 16, 16), dtype=torch.uint8)
        found, expected = extractor(grey), extractor(grey.repeat(1, 3, 1, 1))
        assert torch.equal(found, expected)

    def test_on_our_classifier_all_metrics_are_those_of_calculate_metrics_on_png_files(
        self, trained_folder: Path, extractor: Extractor, tmp_path: Path
    ) -> None:
        images, _ = digits()
        noise = torch.randn(400, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 25
        fake, real = (images[:400] + noise).clamp(0, 255).round().to(torch.uint8), images[400:1000]
        path = trained_folder / "features.safetensors"
        expected = theirs(as_png(fake, tmp_path / "a"), as_png(real, tmp_path / "b"), fidelity.register(), path, 200)
        assert expected["frechet_inception_distance"] > 0.5
        agree(extractor, fake, real, expected, 200)


def random_inception(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Random weights in the published layout, as the pickle torch-fidelity reads and as safetensors."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    with monkeypatch.context() as patch:
        kept: dict[str, Any] = {}
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: kept)
        patch.setattr(
            FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: state.update(self.state_dict())
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], verbose=False)
    torch.save(kept, folder / "random.pth")
    save_file(kept, folder / "random.safetensors")
    return folder / "random.pth"
