"""Statistics, the Fréchet distance, KID, precision and recall, and reference statistics kept by content."""

import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import frechet_distance
from pickled import Bomb
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from ddpm_ema import metrics
from ddpm_ema.errors import UserError
from ddpm_ema.messages import logger
from ddpm_ema.metrics import Estimate, FrechetReference, Statistics, statistics_of
from ddpm_ema.metrics.nearest import nearest


def gaussian(n: int, d: int, seed: int = 0, scale: float = 1.0, offset: float = 0.0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * scale + offset


class TestStatistics:
    def test_they_are_numpys_mean_and_unbiased_covariance(self) -> None:
        features = gaussian(50, 6, offset=2).double()
        found = statistics_of(features)
        np.testing.assert_allclose(found.mu, features.mean(dim=0), rtol=1e-13)
        np.testing.assert_allclose(found.sigma, np.cov(features.T), rtol=1e-11, atol=1e-14)
        assert found.count == 50

    def test_the_covariance_is_exact_far_from_the_origin(self) -> None:
        features = gaussian(200, 4).double() * 1e-3 + 1e4
        truth = torch.from_numpy(np.cov((features - 1e4).T))
        assert (statistics_of(features).sigma - truth).norm() / truth.norm() < 1e-12

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_features_that_are_not_finite_name_the_weights_and_the_image(self, value: float) -> None:
        features = gaussian(6, 3)
        features[4, 1] = value
        with pytest.raises(
            UserError, match=r"ema_0_999: the features of image 41 are not finite \(1 of 6 images here\)"
        ):
            metrics.check_finite(features, torch.tensor([10, 11, 20, 21, 41, 50]), name="ema_0_999")


class TestFrechetDistance:
    def test_it_is_the_closed_form_where_covariances_commute(self) -> None:
        a = Statistics(torch.tensor([1.0, 2.0]).double(), torch.diag(torch.tensor([4.0, 9.0]).double()), 10)
        b = Statistics(torch.tensor([0.0, 0.0]).double(), torch.diag(torch.tensor([1.0, 25.0]).double()), 10)
        expected = (1 + 4) + (2 - 1) ** 2 + (3 - 5) ** 2
        assert FrechetReference(b).distance(a.mu, a.sigma) == pytest.approx(expected, rel=1e-12)

    @pytest.mark.parametrize("n", [500, 100, 20])
    def test_the_fast_form_is_torch_fidelitys_to_1e_9(self, n: int) -> None:
        mixing = gaussian(64, 64, seed=5)
        real, fake = statistics_of(gaussian(2000, 64, 1) @ mixing), statistics_of(gaussian(n, 64, 2, 1.1, 0.2) @ mixing)
        slow, fast = frechet_distance(fake, real), FrechetReference(real).distance(fake.mu, fake.sigma)
        # With fewer images than dimensions the general eigenvalues of a singular product carry rounding of their own.
        assert fast == pytest.approx(slow, rel=1e-9 if n > 64 else 1e-7)

    def test_a_singular_reference_will_do(self) -> None:
        real, fake = statistics_of(gaussian(10, 24, 1)), statistics_of(gaussian(100, 24, 2, 1.1))
        assert FrechetReference(real).distance(fake.mu, fake.sigma) == pytest.approx(
            frechet_distance(fake, real), rel=1e-7
        )
        dead = Statistics(torch.zeros(3).double(), torch.diag(torch.tensor([4.0, 0.0, 1.0]).double()), 10)
        assert FrechetReference(dead).distance(torch.zeros(3), torch.eye(3)) == pytest.approx(1 + 1 + 0, abs=1e-12)

    def test_a_broken_reference_is_a_message_not_a_linalg_error(self) -> None:
        good = statistics_of(gaussian(50, 3))
        with pytest.raises(UserError, match="the reference: the covariance of the features is not finite"):
            FrechetReference(Statistics(good.mu, good.sigma * float("nan"), 50))

    def test_it_is_torch_fidelitys_on_the_same_features(self) -> None:
        real, fake = gaussian(400, 16, 1, offset=0.5), gaussian(300, 16, 2, 1.2)
        theirs = fid_statistics_to_metric(fid_features_to_statistics(fake), fid_features_to_statistics(real), False)
        found = metrics.estimate_distance(fake, torch.arange(300), 10, FrechetReference(statistics_of(real)))
        assert found.plain == pytest.approx(*theirs.values(), rel=1e-6)


def groups(features: Tensor, number: int = 10) -> Tensor:
    return torch.arange(len(features)) % number


def precision_recall(features: Tensor, reference: Tensor) -> tuple[float, float]:
    membership, radii = groups(features), metrics.neighbour_radii(reference)
    return metrics.precision(features, membership, reference, radii).plain, metrics.recall(
        features, membership, reference
    ).plain


def kernel_distance(features: Tensor, reference: Tensor, population: bool = False) -> Estimate:
    return metrics.KernelReference(reference, 10, population).estimate(features, groups(features))


class TestOtherScores:
    def test_precision_and_recall_of_points_on_a_line(self) -> None:
        reference = torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0]])  # third neighbours at 3, 2, 2, 2, 3
        features = torch.tensor(
            [[0.5], [3.5], [20.0], [30.0], [40.0]]
        )  # third neighbours at 29.5, 26.5, 19.5, 26.5, 36.5
        assert metrics.neighbour_radii(reference).tolist() == [3, 2, 2, 2, 3]
        assert precision_recall(features, reference) == (0.4, 1.0)

    def test_precision_and_recall_are_torch_fidelitys(self) -> None:
        features, reference = gaussian(150, 8, 1, 0.8), gaussian(200, 8, 2, 1.0, 0.4)
        theirs = prc_features_to_metric(features, reference, verbose=False)
        assert 0.2 < theirs["precision"] < 1 > theirs["recall"] > 0.2
        assert precision_recall(features, reference) == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-7)

    @pytest.mark.parametrize("measure", ["kid", "precision", "recall"])
    def test_a_group_is_left_out_as_if_its_images_were_never_made(self, measure: str) -> None:
        features, reference, number = gaussian(60, 4, 1, 0.9), gaussian(80, 4, 2), 5
        membership, radii = groups(features, number), metrics.neighbour_radii(reference)

        def estimate(kept: Tensor, of: Tensor) -> Estimate:
            if measure == "kid":
                return metrics.KernelReference(reference, number).estimate(kept, of)
            found = metrics.precision(kept, of, reference, radii)
            return found if measure == "precision" else metrics.recall(kept, of, reference)

        found = estimate(features, membership)
        assert found.unbiased == pytest.approx(found.plain)
        without = [estimate(features[membership != g], membership[membership != g]).plain for g in range(number)]
        expected = (number - 1) * (np.mean(without) - np.array(without))
        assert np.array(found.sides[0].pseudo_values) - found.plain == pytest.approx(expected, rel=1e-3, abs=1e-5)

    def test_no_matrix_of_distances_is_larger_than_is_held_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        features, reference, sizes = gaussian(60, 4, 1), gaussian(90, 4, 2), list[int]()
        columns: list[int] = []  # torch.cdist copies them

        def found() -> tuple[tuple[float, float], Tensor]:
            return precision_recall(features, reference), nearest(features, reference)

        def watched(a: Tensor, b: Tensor, cdist: Callable[[Tensor, Tensor], Tensor] = torch.cdist) -> Tensor:
            sizes.append(len(a) * len(b))
            columns.append(len(b))
            return cdist(a, b)

        (shares, distances) = found()
        monkeypatch.setattr("ddpm_ema.metrics.nearest.PAIRS", 500)
        monkeypatch.setattr("ddpm_ema.metrics.nearest.COLUMNS", 40)
        monkeypatch.setattr(torch, "cdist", watched)
        assert found()[0] == pytest.approx(shares)
        torch.testing.assert_close(found()[1], distances, rtol=1e-3, atol=1e-5)
        assert max(sizes) <= 500
        assert max(columns) == 40

    def test_the_errors_are_the_spread_over_repeated_draws(self) -> None:
        """Recall's may be too large (by half, in the simulations that the documentation names), and is not too small."""
        reference = gaussian(300, 4, 10_000)
        radii, kernel = metrics.neighbour_radii(reference), metrics.KernelReference(reference, 20)
        found: dict[str, list[Estimate]] = {"kid": [], "precision": [], "recall": []}
        for seed in range(60):
            features = gaussian(300, 4, seed, 0.8, 0.3)
            membership = groups(features, 20)
            found["kid"].append(kernel.estimate(features, membership))
            found["precision"].append(metrics.precision(features, membership, reference, radii))
            found["recall"].append(metrics.recall(features, membership, reference))
        ratios = {
            key: np.mean([one.stderr for one in many]) / np.std([one.plain for one in many], ddof=1)
            for key, many in found.items()
        }
        assert ratios["kid"] == pytest.approx(1, abs=0.3)
        assert ratios["precision"] == pytest.approx(1, abs=0.3)
        assert 0.85 < ratios["recall"] < 1.8

    def test_kernel_distance_is_torch_fidelitys_over_all_images(self) -> None:
        features, reference = gaussian(120, 32, 1, 1.1), gaussian(120, 32, 2)
        theirs = kid_features_to_metric(features, reference, kid_subsets=1, kid_subset_size=120, verbose=False)
        ours = kernel_distance(features, reference)
        assert ours.plain == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)

    def test_kernel_distance_is_unbiased_and_the_reference_may_be_a_sample_too(self) -> None:
        found = [kernel_distance(gaussian(200, 8, i), gaussian(200, 8, 999 + i), True) for i in range(40)]
        values = np.array([one.plain for one in found])
        assert abs(values.mean()) < 3 * values.std(ddof=1) / 40**0.5
        assert np.mean([one.stderr for one in found]) == pytest.approx(values.std(ddof=1), rel=0.4)
        assert all(one.sides[0].variance < one.stderr**2 for one in found)


@dataclass
class CountingExtractor:
    """Mean colours as features; counts the images it has seen."""

    sha256: str = "a" * 64
    seen: int = 0

    def __call__(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        return images.float().mean(dim=(2, 3))


def image_batches(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (n, 3, 4, 4), generator=generator, dtype=torch.uint8) for n in (16, 16, 9)]


class TestReference:
    def make(self, cache: Path, extractor: CountingExtractor, **changed: str) -> tuple[metrics.Reference, list[str]]:
        """The reference, and what the user is told."""
        settings = {"fingerprint": "f0", "split": "train", "resize": "none", **changed}
        key = metrics.content_key(extractor={"extractor_sha256": extractor.sha256}, **settings)
        notes, handler = list[str](), logging.Handler()
        handler.emit = lambda record: notes.append(record.getMessage())  # type: ignore[method-assign]
        logger.addHandler(handler)
        try:
            if (found := metrics.load_cached(cache, key)) is None:
                features = torch.cat([extractor(images) for images in image_batches()])
                found = metrics.reference_of(features, key, saturated=0.25)
                found = metrics.with_radii(found, 128 + 40 * gaussian(20, 3, 5))
                metrics.keep(found, cache)
        finally:
            logger.removeHandler(handler)
        return found, notes

    def test_it_is_made_of_every_image_once_and_kept(self, tmp_path: Path) -> None:
        extractor = CountingExtractor()
        (made, _), (found, _) = self.make(tmp_path, extractor), self.make(tmp_path, extractor)
        assert extractor.seen == 41 == made.statistics.count == found.statistics.count
        truth = statistics_of(torch.cat(image_batches()).float().mean(dim=(2, 3)))
        torch.testing.assert_close(made.statistics.sigma, truth.sigma)
        for name in ("mu", "sigma"):
            assert torch.equal(getattr(made.statistics, name), getattr(found.statistics, name))
        assert made.features is not None
        assert found.features is not None
        assert torch.equal(made.features, found.features)
        assert made.origin == found.origin
        assert found.saturated == made.saturated == 0.25
        expected = precision_recall(128 + 40 * gaussian(20, 3, 5), made.features)[0]
        assert 0 < expected < 1
        assert found.precision_of_noise == made.precision_of_noise == expected
        assert torch.equal(metrics.neighbour_radii(made.features), found.radii)  # type: ignore[arg-type]

    @pytest.mark.parametrize("changed", [{"fingerprint": "f1"}, {"split": "test"}, {"resize": "bicubic"}])
    def test_other_data_or_another_resize_is_computed_anew(self, tmp_path: Path, changed: dict[str, str]) -> None:
        extractor = CountingExtractor()
        self.make(tmp_path, extractor)
        self.make(tmp_path, extractor, **changed)
        assert extractor.seen == 82

    def test_another_extractor_of_the_same_name_is_computed_anew(self, tmp_path: Path) -> None:
        self.make(tmp_path, CountingExtractor())
        other = CountingExtractor(sha256="b" * 64)
        self.make(tmp_path, other)
        assert other.seen == 41

    def test_features_of_timm_belong_to_its_version(self, monkeypatch: pytest.MonkeyPatch) -> None:
        settings = {"fingerprint": "f0", "split": "train", "resize": "none"}

        def keys() -> list[dict[str, object]]:
            return [metrics.content_key(extractor={"extractor": name}, **settings) for name in ("timm:m", "classifier")]

        before = keys()
        monkeypatch.setattr(metrics.reference, "version", lambda name, real=version: name == "timm" or real(name))
        assert [now == then for now, then in zip(keys(), before, strict=True)] == [False, True]

    @pytest.mark.parametrize("damage", ["truncated", "one bit", "foreign"])
    def test_a_damaged_or_foreign_entry_is_made_anew_with_a_note(self, tmp_path: Path, damage: str) -> None:
        extractor = CountingExtractor()
        good, notes = self.make(tmp_path, extractor)
        assert notes == []
        (entry,) = (tmp_path / "reference").iterdir()
        content = bytearray(entry.read_bytes())
        if damage == "truncated":
            entry.write_bytes(content[:-7])
        elif damage == "one bit":
            content[-7] ^= 1
            entry.write_bytes(content)
        else:
            self.make(tmp_path, extractor, fingerprint="other")
            (foreign,) = set((tmp_path / "reference").iterdir()) - {entry}
            os.replace(foreign, entry)
        extractor.seen = 0
        again, (note,) = self.make(tmp_path, extractor)
        assert "not used, made anew" in note
        assert extractor.seen == 41
        assert torch.equal(again.statistics.sigma, good.statistics.sigma)
        assert self.make(tmp_path, extractor)[1] == []

    def test_a_cache_that_cannot_be_written_is_one_note_and_scoring_goes_on(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("no folder")
        made, (note,) = self.make(tmp_path / "file" / "cache", CountingExtractor())
        assert made.statistics.count == 41
        assert "not cached" in note
        assert "--data.cache-dir" in note

    def test_fewer_than_two_images_are_an_error_and_fewer_than_dimensions_a_warning(self) -> None:
        with pytest.raises(UserError, match="the reference: a covariance needs at least 2 images and there are 1"):
            metrics.reference_of(torch.zeros(1, 3), {})
        (note,) = metrics.reference_of(gaussian(3, 5), {}).warnings
        assert note == "the reference has 3 images for 5 feature dimensions"


class TestPublishedStatistics:
    def write(self, path: Path, layout: str, dim: int = 4) -> Statistics:
        truth = statistics_of(gaussian(50, dim))
        arrays = {"mu": truth.mu.numpy(), "sigma": truth.sigma.numpy()}
        if layout == "ADM":
            arrays |= {"mu_s": np.zeros(9), "sigma_s": np.eye(9), "arr_0": np.zeros((2, 4, 4, 3), np.uint8)}
        if layout == "torch-fidelity":
            arrays["mu"] = arrays["mu"].astype(np.float32)
        np.savez(path, **arrays)
        return truth

    @pytest.mark.parametrize("layout", ["EDM", "ADM", "torch-fidelity"])
    def test_each_layout_is_read_and_its_origin_recorded(self, tmp_path: Path, layout: str) -> None:
        path = tmp_path / "stats.npz"
        truth = self.write(path, layout)
        reference = metrics.read_published(path, 4)
        torch.testing.assert_close(reference.statistics.mu, truth.mu, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(reference.statistics.sigma, truth.sigma)
        assert reference.features is None
        assert reference.origin["file"] == "stats.npz"
        assert len(reference.origin["sha256"]) == 64
        assert reference.origin["layout"] == ("ADM" if layout == "ADM" else "EDM or torch-fidelity")
        json.dumps(dict(reference.origin))

    def test_another_dimension_is_refused(self, tmp_path: Path) -> None:
        self.write(tmp_path / "s.npz", "EDM", dim=5)
        with pytest.raises(UserError, match=r"mu \(5,\) and sigma \(5, 5\), but the extractor gives 4 features"):
            metrics.read_published(tmp_path / "s.npz", 4)

    def test_a_pickle_inside_is_not_opened(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "s.npz", mu=np.array([Bomb(tmp_path / "exploded")], dtype=object), sigma=np.eye(4))
        with pytest.raises(UserError, match="pickled ones are not opened"):
            metrics.read_published(tmp_path / "s.npz", 4)
        assert not (tmp_path / "exploded").exists()

    def test_numbers_of_any_precision_and_byte_order_are_read(self, tmp_path: Path) -> None:
        truth = self.write(tmp_path / "s.npz", "EDM")
        np.savez(tmp_path / "b.npz", mu=truth.mu.numpy().astype(">f8"), sigma=truth.sigma.numpy().astype(">f4"))
        read = metrics.read_published(tmp_path / "b.npz", 4).statistics
        torch.testing.assert_close(read.mu, truth.mu)
        torch.testing.assert_close(read.sigma, truth.sigma, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize(
        ("mu", "sigma", "message"),
        [
            (np.zeros(4).astype(str), np.eye(4), "mu holds <U32, wanted real numbers"),
            (np.zeros(4), np.eye(4) + 1j, "sigma holds complex128, wanted real numbers"),
            (np.zeros(4), np.triu(np.ones((4, 4))), "sigma is no covariance"),
            (np.zeros(4), -np.eye(4), "sigma is no covariance"),
        ],
    )
    def test_what_is_no_mean_and_covariance_is_a_message(
        self, tmp_path: Path, mu: np.ndarray, sigma: np.ndarray, message: str
    ) -> None:
        np.savez(tmp_path / "s.npz", mu=mu, sigma=sigma)
        with pytest.raises(UserError, match=message):
            metrics.read_published(tmp_path / "s.npz", 4)

    @pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 damaged"])
    def test_a_file_that_is_no_archive_is_a_message(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "s.npz").write_bytes(content)
        with pytest.raises(UserError, match=r"evaluation.reference: .*s.npz"):
            metrics.read_published(tmp_path / "s.npz", 4)

    def test_a_missing_file_and_missing_arrays_are_named(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="No such file"):
            metrics.read_published(tmp_path / "none.npz", 4)
        np.savez(tmp_path / "s.npz", mean=np.zeros(4))
        with pytest.raises(UserError, match=r"holds \['mean'\]; wanted mu and sigma"):
            metrics.read_published(tmp_path / "s.npz", 4)
