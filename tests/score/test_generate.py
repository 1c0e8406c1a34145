"""One process: weights in, features out, and one message for what is wrong with either."""

import pytest
import torch
from scored import make_run, weights

from ddpm_ema.errors import UserError
from ddpm_ema.features import open_extractor
from ddpm_ema.score.generate import Generator


@pytest.fixture
def generator(tmp_path):
    run = make_run(tmp_path / "run")
    made = Generator(run, [open_extractor("classifier", run.output_dir)], batch_size=4)
    made.load("raw", None, [weights()])
    return made


def test_it_says_where_it_is_after_each_network_evaluation_and_gives_the_images_beside_their_features(generator):
    steps = []
    (extractor,) = generator.extractors
    made = generator.generate([14, 15, 16], [extractor], lambda: steps.append(1))
    assert len(steps) == len(generator.sampler) == 4
    assert made["images"].indices.tolist() == made[extractor].indices.tolist() == [14, 15, 16]
    assert made["images"].images.shape == (3, 1, 8, 8)
    again = generator.read("raw", [14, 15, 16], made["images"].images, [extractor])[extractor]
    torch.testing.assert_close(made[extractor].features, again.features)


def test_a_device_without_room_says_what_to_lower(generator, monkeypatch):
    def full(x_t, timesteps, labels):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(generator.network, "predict", full)
    with pytest.raises(UserError, match=r"2 images at once: lower --evaluation\.batch-size"):
        generator.generate([0, 1], list(generator.extractors))


@pytest.mark.parametrize("what", ["pixels", "features"])
def test_what_is_not_finite_is_named_with_its_weights_and_its_image(generator, monkeypatch, what):
    if what == "pixels":
        generator.load("ema", None, [{**weights(), "conv_out.bias": torch.tensor([float("nan")])}])
    else:
        (extractor,) = generator.extractors.values()
        generator.name, dim = "ema", extractor.dim
        broken = torch.full((2, dim), float("inf"))
        monkeypatch.setattr(type(extractor), "__call__", lambda self, images: broken)
    with pytest.raises(UserError, match=rf"ema: the {what} of image 30 are not finite \(2 of 2 images here\)"):
        generator.generate([30, 31], list(generator.extractors))
