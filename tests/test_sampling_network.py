"""The network that samples: weights in, ensembles, one compiled batch size, guidance."""

import pytest
import torch
from scored import again, settings, weights

from ddpm_ema import model
from ddpm_ema.errors import UserError
from ddpm_ema.sampling_network import SamplingNetwork, guided


@pytest.fixture
def run(tmp_path):
    return settings(tmp_path)


def network_of(run):
    unet = model.build(run)
    return SamplingNetwork(unet, run.evaluation, torch.device("cpu"), 4, model.no_label(unet))


def test_an_ensemble_averages_predictions_not_weights(run):
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


def test_weights_of_another_model_are_refused_tensor_by_tensor(run):
    network = network_of(run)
    broken = weights()
    broken["conv_in.weight"] = torch.zeros(3, 3)
    del broken["conv_out.bias"]
    with pytest.raises(UserError, match=r"not of this model: 'conv_out.bias' is missing .*; 'conv_in.weight' has"):
        network.load([broken], "ema")


def test_guidance_of_a_model_without_classes_is_an_error(run):
    with pytest.raises(UserError, match="class-conditional"):
        network_of(again(run, evaluation__guidance_scale=2.0))


def test_compiled_networks_see_one_batch_size_only(run, monkeypatch):
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


def by_label(x_t, timesteps, labels):
    return labels.float()[:, None, None, None].expand_as(x_t)


def test_guidance_goes_beyond_the_labelled_prediction_by_the_scale():
    x_t, t = torch.zeros(2, 1, 2, 2), torch.zeros(2, dtype=torch.int64)
    made = guided(by_label, 3.0, no_label=10)(x_t, t, torch.tensor([4, 7]))
    assert made[:, 0, 0, 0].tolist() == [10 + 3 * (4 - 10), 10 + 3 * (7 - 10)]


def test_guidance_by_a_scale_of_one_costs_no_second_pass():
    assert guided(by_label, 1.0, no_label=10) is by_label
