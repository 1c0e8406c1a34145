"""The jackknife on Gaussian features whose true distances are known: bias, standard errors, pairing, coverage."""

import json

import numpy as np
import pytest
import torch
from oracles import frechet_distance
from scipy.stats import t
from torch import Tensor

from ddpm_ema import metrics
from ddpm_ema.errors import UserError
from ddpm_ema.metrics import Estimate, FrechetReference, Statistics, statistics_of
from ddpm_ema.metrics.jackknife import jackknife


def standard_reference(dim: int) -> FrechetReference:
    return FrechetReference(Statistics(torch.zeros(dim).double(), torch.eye(dim).double(), 10**9))


def features(n: int, dim: int, seed: int, scale: float = 1.1, offset: float = 0.1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, dim, generator=generator, dtype=torch.float64) * scale + offset


def of(values: Tensor, groups: int, reference: FrechetReference) -> Estimate:
    return metrics.estimate_distance(values, torch.arange(len(values)), groups, reference)


class TestFormulas:
    def test_equal_groups_give_the_textbooks_pseudo_values_mean_and_variance(self) -> None:
        values, reference, groups = features(60, 3, 0), standard_reference(3), 6
        found = of(values, groups, reference)

        def distance(kept: Tensor) -> float:
            return frechet_distance(statistics_of(kept), reference.statistics)

        membership = torch.arange(60) % groups
        full = distance(values)
        pseudo = np.array([groups * full - (groups - 1) * distance(values[membership != g]) for g in range(groups)])
        assert found.plain == pytest.approx(full, rel=1e-10)
        assert found.unbiased == pytest.approx(pseudo.mean(), rel=1e-9)
        assert found.stderr == pytest.approx(pseudo.std(ddof=1) / groups**0.5, rel=1e-9)
        half = t.ppf(0.975, groups - 1) * found.stderr
        assert found.interval() == pytest.approx((found.unbiased - half, found.unbiased + half))

    @pytest.mark.parametrize("sizes", [(5, 5, 5, 5), (5, 5, 5, 4, 4), (9, 1, 3)])
    def test_a_bias_of_one_over_n_is_taken_away_exactly_whatever_the_sizes_of_the_groups(
        self, sizes: tuple[int, ...]
    ) -> None:
        total = sum(sizes)
        left = {None: total, **{g: total - m for g, m in enumerate(sizes)}}
        plain, side = jackknife(lambda group: 2.0 + 7.0 / left[group], dict(enumerate(sizes)))
        assert plain == 2.0 + 7.0 / total
        assert side.mean == pytest.approx(2.0, rel=1e-13)

    def test_groups_of_unequal_size_weigh_by_their_size_in_the_standard_error(self) -> None:
        values, sizes = features(23, 1, 3)[:, 0], (5, 5, 5, 4, 4)
        kept = {None: values, **{g: values[torch.arange(23) % 5 != g] for g in range(5)}}
        _, side = jackknife(lambda g: float(kept[g].mean()), dict(enumerate(sizes)))
        # Of a mean the pseudo-values are the groups' own means, and nothing is biased.
        means = np.array([float(values[torch.arange(23) % 5 == g].mean()) for g in range(5)])
        assert side.pseudo_values == pytest.approx(tuple(means))
        assert side.mean == pytest.approx(float(values.mean()))
        weights = 1 / (23 / np.array(sizes) - 1)
        assert side.variance == pytest.approx(np.mean(weights * (means - float(values.mean())) ** 2))

    @pytest.mark.parametrize("n", [300, 60])  # more and fewer images than dimensions: the two ways it is computed
    def test_both_ways_leave_each_group_out_as_if_its_images_were_never_made(self, n: int) -> None:
        dim, groups = 64, 7
        mixing = features(dim, dim, 9, 1, 0)
        reference = FrechetReference(statistics_of(features(1000, dim, 1, 1, 0) @ mixing))
        values, order = features(n, dim, 2) @ mixing, torch.randperm(n, generator=torch.Generator().manual_seed(0))
        found = metrics.estimate_distance(values[order], order, groups, reference)

        def distance(left_out: int | None) -> float:
            kept = statistics_of(values[torch.arange(n) % groups != (-1 if left_out is None else left_out)])
            return reference.distance(kept.mu, kept.sigma)

        plain, side = jackknife(distance, {g: len(range(g, n, groups)) for g in range(groups)})
        tolerance = 1e-9 if n > dim else 1e-6  # rounding of a singular covariance, magnified by the groups
        assert found.plain == pytest.approx(plain, rel=tolerance)
        assert found.unbiased == pytest.approx(side.mean, rel=tolerance)
        assert found.stderr == pytest.approx(side.variance**0.5, rel=tolerance)

    def test_it_survives_a_file(self) -> None:
        found = of(features(40, 3, 0), 10, standard_reference(3))
        assert Estimate.from_dict(json.loads(json.dumps(found.to_dict()))) == found


class TestBadInput:
    def test_fewer_images_than_dimensions_carry_a_warning_in_the_result(self) -> None:
        (note,) = of(features(32, 32, 0), 10, standard_reference(32)).warnings
        assert note.startswith("32 images for 32 feature dimensions: the covariance is singular")

    def test_fewer_than_ten_images_per_dimension_carry_a_warning_about_the_distances_own_interval(self) -> None:
        for count, warned in ((33, 1), (319, 1), (320, 0)):
            notes = of(features(count, 32, 0), 10, standard_reference(32)).warnings
            assert len(notes) == warned
            assert all("below 10 per dimension" in note for note in notes)

    def test_weights_over_other_images_are_not_paired(self) -> None:
        reference = standard_reference(2)
        with pytest.raises(ValueError, match=r"40 and 50 images in groups .* cannot be paired"):
            metrics.difference(of(features(40, 2, 0), 10, reference), of(features(50, 2, 0), 10, reference))

    def test_too_few_images_or_groups_are_errors(self) -> None:
        reference = standard_reference(2)
        for indices in ([0], [0, 1], [0, 10, 20], [0, 10, 20, 1]):
            with pytest.raises(
                UserError, match=f"2 images beside any one group, and on one side are {len(indices)} images"
            ):
                metrics.estimate_distance(
                    features(len(indices), 1, 0), torch.tensor(indices), 10, standard_reference(1)
                )
        with pytest.raises(UserError, match=r"2 images in 2 groups: raise .* or take a larger reference"):
            metrics.estimate_distance(
                features(40, 2, 0), torch.arange(40), 10, reference, sampled_from=features(2, 2, 1)
            )

    def test_features_that_are_not_finite_name_weights_and_image(self) -> None:
        values = features(20, 2, 0)
        values[3, 0] = float("nan")
        with pytest.raises(UserError, match="power_0_05: the features of image 103 are not finite"):
            metrics.estimate_distance(values, torch.arange(100, 120), 10, standard_reference(2), name="power_0_05")


class Draws:
    """Two copies with features correlated 0.9, drawn again and again; true distances in closed form."""

    def __init__(self, dim: int, images: int, groups: int, repeats: int) -> None:
        self.true_a, true_b = dim * (0.1**2 + 0.1**2), dim * (0.05**2 + 0.03**2)
        self.true_delta = self.true_a - true_b
        reference, rows = standard_reference(dim), []
        for seed in range(repeats):
            shared, fresh = features(images, dim, 2 * seed, 1, 0), features(images, dim, 2 * seed + 1, 1, 0)
            a = of(shared * 1.1 + 0.1, groups, reference)
            b = of((0.9 * shared + (1 - 0.81) ** 0.5 * fresh) * 1.03 + 0.05, groups, reference)
            d = metrics.difference(a, b)
            rows.append((a.plain, a.unbiased, a.stderr, b.stderr, d.unbiased, d.stderr, *a.interval(), *d.interval()))
        columns = np.array(rows).T
        self.plain, self.corrected, self.stderr, self.stderr_b, self.delta, self.delta_stderr = columns[:6]
        self.covered = (columns[6] <= self.true_a) & (self.true_a <= columns[7])
        self.delta_covered = (columns[8] <= self.true_delta) & (self.true_delta <= columns[9])


class TestOnGaussians:
    @pytest.fixture(scope="class")
    def draws(self) -> Draws:
        return Draws(dim=16, images=400, groups=20, repeats=60)

    def test_the_correction_takes_the_bias_away(self, draws: Draws) -> None:
        noise = draws.corrected.std(ddof=1) / 60**0.5
        assert draws.plain.mean() - draws.true_a > 10 * noise  # there is a bias to be seen ...
        assert abs(draws.corrected.mean() - draws.true_a) < 3 * noise  # ... and it is gone

    def test_the_standard_error_is_the_spread_over_repeated_draws(self, draws: Draws) -> None:
        assert draws.stderr.mean() == pytest.approx(draws.corrected.std(ddof=1), rel=0.25)
        assert draws.delta_stderr.mean() == pytest.approx(draws.delta.std(ddof=1), rel=0.25)

    def test_intervals_cover_the_truth_as_often_as_they_say(self, draws: Draws) -> None:
        # Binomial(60, 0.95) lies in 52..60 with probability 0.9995.
        assert 52 <= draws.covered.sum() <= 60
        assert 52 <= draws.delta_covered.sum() <= 60

    def test_pairing_narrows_the_difference_and_leaves_it_unbiased(self, draws: Draws) -> None:
        unpaired = np.hypot(draws.stderr, draws.stderr_b)
        assert draws.delta_stderr.mean() < 0.65 * unpaired.mean()
        assert abs(draws.delta.mean() - draws.true_delta) < 3 * draws.delta.std(ddof=1) / 60**0.5

    def test_p_values_and_intervals_agree_and_a_difference_turns_its_sign_with_its_order(self) -> None:
        reference = standard_reference(8)
        near, far = features(400, 8, 0, 1.0, 0.0), features(400, 8, 0, 1.05, 0.1)
        ours, theirs = of(near, 20, reference), of(far, 20, reference)
        gap = metrics.difference(theirs, ours)
        assert metrics.difference(ours, theirs).unbiased == -gap.unbiased
        assert gap.p_value == pytest.approx(2 * gap.p_above)
        assert gap.interval(gap.p_value)[0] == pytest.approx(0, abs=1e-12)
        same = metrics.difference(ours, ours)
        assert (same.p_value, same.p_above, same.interval()) == (1.0, 1.0, (0.0, 0.0))

    @pytest.mark.slow
    @pytest.mark.parametrize(("dim", "images", "groups"), [(32, 1000, 20), (64, 2000, 10), (256, 5120, 10)])
    def test_the_table_of_the_documentation_holds(self, dim: int, images: int, groups: int) -> None:
        repeats = 40
        draws = Draws(dim, images, groups, repeats)
        spread = draws.corrected.std(ddof=1)
        assert draws.plain.mean() > 1.3 * draws.true_a
        assert abs(draws.corrected.mean() - draws.true_a) < 3 * spread / repeats**0.5 + 0.01 * draws.true_a
        assert abs(draws.delta.mean() / draws.true_delta - 1) < 0.02
        assert draws.covered.sum() >= 34
        assert draws.delta_covered.sum() >= 34


class TestAgainstThePopulation:
    """The reference is a sample, too: `benchmarks/reference.py` has more draws and the table of the documentation."""

    def test_the_two_sides_add_up(self) -> None:
        """p from leaving samples out, q from leaving reference images out: mean p + mean q - F, variances added."""
        samples, real, groups = features(60, 3, 0), features(80, 3, 1, 1.0, 0.0), 5

        def distance(kept: Tensor, reference: Tensor) -> float:
            return frechet_distance(statistics_of(kept), statistics_of(reference))

        full = distance(samples, real)
        p, q = [], []
        for g in range(groups):
            kept, other = samples[torch.arange(60) % groups != g], real[torch.arange(80) % groups != g]
            p.append(groups * full - (groups - 1) * distance(kept, real))
            q.append(groups * full - (groups - 1) * distance(samples, other))
        found = metrics.estimate_distance(
            samples, torch.arange(60), groups, FrechetReference(statistics_of(real)), sampled_from=real
        )
        assert found.unbiased == pytest.approx(np.mean(p) + np.mean(q) - full, rel=1e-9)
        assert found.stderr == pytest.approx(((np.var(p, ddof=1) + np.var(q, ddof=1)) / groups) ** 0.5, rel=1e-9)
        assert Estimate.from_dict(json.loads(json.dumps(found.to_dict()))) == found

    def test_equal_models_are_called_different_as_often_as_they_should_and_the_reference_adds_no_bias(self) -> None:
        """100 reference images: held fixed, they make two equally far models differ, and every distance too large."""
        dim, images, draws = 6, 400, 60
        different = {"fixed": 0, "both": 0}
        bias = {"fixed": 0.0, "both": 0.0}
        for seed in range(draws):
            real, shared, fresh = (features(n, dim, 3 * seed + i, 1, 0) for i, n in enumerate((100, images, images)))
            shift = torch.zeros(dim).double()
            shift[0] = 0.2
            pair = shared + shift, 0.9 * shared + (1 - 0.81) ** 0.5 * fresh - shift
            reference = FrechetReference(statistics_of(real))
            for name, more in (("fixed", {}), ("both", {"sampled_from": real})):
                a, b = (metrics.estimate_distance(x, torch.arange(images), 20, reference, **more) for x in pair)
                different[name] += metrics.difference(a, b).p_value <= metrics.ALPHA
                bias[name] += (a.unbiased - 0.04) / draws
        assert different["both"] <= 8, "5% of 60, and three standard errors"
        assert different["fixed"] >= 14
        assert abs(bias["both"]) < 0.05 < bias["fixed"]

    def test_few_reference_images_are_warned_of_like_few_samples(self) -> None:
        samples, real = features(400, 16, 0), features(100, 16, 1)
        reference = FrechetReference(statistics_of(real))
        found = metrics.estimate_distance(samples, torch.arange(400), 10, reference, sampled_from=real)
        assert found.warnings[0].startswith("100 images for 16 feature dimensions: below 10 per dimension")
