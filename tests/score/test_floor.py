"""Real images beside the reference's: what a perfect generator would reach, and what nearness to training images means."""

import pytest
import torch
from scored import again, make_run, results

from ddpm_ema import config, data
from ddpm_ema.features import open_extractor, save_classifier, train_classifier
from ddpm_ema.metrics.nearest import nearer_to_training, nearest
from ddpm_ema.score.reference import floor_split, reading_of
from ddpm_ema.score.results import table


def noise(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


class TestNearerToTraining:
    def test_it_is_one_half_for_new_samples_and_one_for_copies(self) -> None:
        training, held_out, fresh = noise(400, 0), noise(300, 1), noise(2000, 2)
        ours = nearest(held_out, training)
        assert nearer_to_training(nearest(fresh, training), ours) == pytest.approx(0.5, abs=0.04)
        assert nearer_to_training(nearest(training + 1e-3, training), ours) == 1.0
        assert nearer_to_training(nearest(fresh + 50, training), ours) == 0.0

    def test_it_is_the_mann_whitney_statistic_with_ties_counted_half(self) -> None:
        samples, held_out = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 2.0, 4.0, 0.0])
        pairs = [(q < p) + 0.5 * (q == p) for q in samples.tolist() for p in held_out.tolist()]
        assert nearer_to_training(samples, held_out) == pytest.approx(sum(pairs) / 12)


@pytest.mark.parametrize(
    ("held_out", "reference", "floor", "population"),
    [
        (0.2, "train", "held_out", False),
        (0.2, "held_out", "train", True),
        (0.2, "test", "held_out", True),
        (0.2, "published.npz", "held_out", False),
        (0.0, "train", "test", False),
        (0.0, "test", "train", True),
    ],
)
def test_real_images_that_are_not_the_reference_s_are_compared_with_it(held_out, reference, floor, population) -> None:
    settings = config.validate({"data": {"held_out": held_out}, "evaluation": {"reference": reference}})
    assert floor_split(settings) == floor
    assert (reading_of(settings) == "population") == population


@pytest.mark.parametrize("trained", ["train+test", "all"])
@pytest.mark.parametrize("reference", ["train", "test"])
def test_images_that_may_be_the_reference_s_own_are_no_floor_and_no_population(trained, reference) -> None:
    settings = config.validate({"data": {"split": trained}, "evaluation": {"reference": reference}})
    assert floor_split(settings) == ""
    assert reading_of(settings) != "population"
    held_out = config.validate({"data": {"split": trained, "held_out": 0.2}, "evaluation": {"reference": "held_out"}})
    assert (floor_split(held_out), reading_of(held_out)) == (trained, "population")


def test_held_out_digits_stand_in_the_table_beside_samples_and_against_them(tmp_path) -> None:
    run = make_run(tmp_path / "run", data__held_out=0.3, evaluation__weights=["raw"])
    found = results(run)
    floor, held_out = found["floor"], data.load(run.data, split="held_out")
    assert (floor["num_images"], floor["split"]) == (len(held_out), "held_out")
    assert 400 < len(held_out) < 700
    low, high = floor["interval95"]
    assert low < floor["distance"] < high
    assert floor["distance"] < 0.05 * found["rows"][0]["frechet_distance_unbiased"], "noise is far from digits"
    assert "real images (held_out)" in table(found)
    assert "near train" in table(found)
    assert found["rows"][0]["nearer_to_training"] < 0.05
    assert found["reading"] == "training images"
    swapped = results(again(run, evaluation__reference="held_out"))
    assert swapped["reading"] == "population"
    assert (swapped["floor"]["num_images"], swapped["floor"]["split"]) == (1797 - len(held_out), "train")
    assert swapped["rows"][0]["nearer_to_training"] == pytest.approx(found["rows"][0]["nearer_to_training"], abs=1e-3)
    assert results(run)["floor"] == floor, "computed once"


def test_without_held_out_images_or_a_test_split_there_is_no_floor(tmp_path) -> None:
    found = results(make_run(tmp_path / "run", evaluation__weights=["raw"]))
    assert "floor" not in found
    assert "real images" not in table(found)


@pytest.mark.parametrize("share", [1e-4, 4e-4])  # of the digits, none and two
def test_too_few_held_out_images_do_not_end_a_scoring(tmp_path, capsys, share) -> None:
    found = results(make_run(tmp_path / "run", data__held_out=share, evaluation__weights=["raw"]))
    assert "floor" not in found
    assert "the table has no line of real images: " in capsys.readouterr().err


def test_a_floor_of_few_images_is_warned_of_as_a_row_is(tmp_path) -> None:
    found = results(make_run(tmp_path / "run", data__held_out=2e-3, evaluation__weights=["raw"]))
    assert "real images (held_out): 7 images for 8 feature dimensions" in " ".join(found["warnings"])


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_real_held_out_digits_against_real_digits_cover_zero(tmp_path, seed) -> None:
    """By a classifier that saw the digits trained on alone."""
    run = make_run(tmp_path / "run", data__held_out=0.3, evaluation__weights=["raw"], evaluation__groups=20)
    train = data.load(run.data)
    trained = train_classifier(train.batch(torch.arange(len(train))), train.labels, seed=seed, num_classes=10)
    save_classifier(run.output_dir / "features.safetensors", trained, fingerprint="x", seed=seed)
    floor = results(run)["floor"]
    print(floor, open_extractor("classifier", run.output_dir).dim)
    low, high = floor["interval95"]
    assert low <= 0 <= high
