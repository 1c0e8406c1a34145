"""The network: the paper's by default, a function of the settings alone, and clear about settings that do not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ddpm_ema import config, model
from ddpm_ema.errors import UserError

SMALL = {"block_out_channels": [8, 16], "attention": [False, True], "norm_num_groups": 4, "layers_per_block": 1}


def settings(**sections: Any) -> config.Config:
    return config.validate({"data": {"image_size": 8, "channels": 3}, "model": SMALL, **sections})


def test_the_defaults_are_the_papers_cifar10_network() -> None:
    network = model.build(config.validate({"data": {"image_size": 32, "channels": 3}}))
    assert sum(parameter.numel() for parameter in network.parameters()) == 35_746_307
    # https://huggingface.co/google/ddpm-cifar10-32, config.json
    published = {
        "act_fn": "silu",
        "attention_head_dim": None,
        "block_out_channels": (128, 256, 256, 256),
        "center_input_sample": False,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "in_channels": 3,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-6,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 32,
        "time_embedding_type": "positional",
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    }
    built = dict(network.config)
    assert {key: built[key] for key in published} == published


@pytest.mark.parametrize(("variance", "out_channels"), [("fixed_small", 3), ("fixed_large", 3), ("learned", 6)])
def test_a_learned_variance_doubles_the_output_channels(variance: str, out_channels: int) -> None:
    network = model.build(settings(diffusion={"variance": variance}))
    output = network(torch.zeros(2, 3, 8, 8), torch.tensor([0, 5])).sample
    assert output.shape == (2, out_channels, 8, 8)


def test_a_class_conditional_network_knows_every_class_and_no_label() -> None:
    network = model.build(settings(model={**SMALL, "class_conditional": True}), num_classes=10)
    assert model.no_label(network) == 10
    x_t = torch.randn(3, 3, 8, 8).repeat_interleave(2, 0)[:3]
    labels = torch.tensor([0, 10, 0])
    output = network(x_t, torch.tensor([4, 4, 4]), labels).sample
    assert not torch.allclose(output[0], output[1], atol=1e-6)  # same x_t, other label
    with pytest.raises(IndexError):
        network(x_t, torch.tensor([4, 4, 4]), torch.tensor([11, 0, 0]))


def test_an_unconditional_network_takes_no_labels_even_where_there_are_some() -> None:
    network = model.build(settings(), num_classes=10)
    assert model.no_label(network) is None
    assert network.class_embedding is None


def test_first_weights_depend_on_the_seed_alone_and_leave_the_generator_as_it_was() -> None:
    torch.manual_seed(1)
    first = model.build(settings()).state_dict()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = model.build(settings()).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = model.build(settings(seed=1)).state_dict()
    assert not torch.equal(first["conv_in.weight"], other["conv_in.weight"])


def test_dropout_reaches_the_residual_blocks() -> None:
    network = model.build(settings(model={**SMALL, "dropout": 0.25}))
    rates = [module.p for name, module in network.named_modules() if name.endswith("dropout")]
    assert rates
    assert set(rates) == {0.25}


@pytest.mark.parametrize(
    ("section", "size", "message"),
    [
        ({**SMALL, "norm_num_groups": 5}, 8, "norm_num_groups: 5 does not divide 8, 16"),
        ({**SMALL, "attention_head_dim": 3}, 8, "attention_head_dim: 3 does not divide 16"),
        (SMALL, 9, "image_size: 9 is not a multiple of 2.*take 10"),
        ({**SMALL, "block_out_channels": [7, 14], "norm_num_groups": 7}, 8, "must be even"),
        ({**SMALL, "class_conditional": True}, 8, "no labels"),
    ],
)
def test_settings_that_do_not_fit_are_named_with_what_to_do(section: dict[str, Any], size: int, message: str) -> None:
    bad = config.validate({"data": {"image_size": size, "channels": 3}, "model": section})
    with pytest.raises(UserError, match=message):
        model.build(bad)


def test_every_misfit_is_named_at_once() -> None:
    bad = config.validate(
        {"data": {"image_size": 9}, "model": {**SMALL, "norm_num_groups": 5, "class_conditional": True}}
    )
    with pytest.raises(UserError) as error:
        model.build(bad)
    for key in ("model.norm_num_groups", "data.image_size", "model.class_conditional"):
        assert key in str(error.value)


def test_lists_of_unequal_length_are_refused() -> None:
    section = config.ModelSettings.model_validate({**SMALL, "attention": [True]})
    bad = config.Config().model_copy(update={"model": section})  # as `validate` itself would not let through
    with pytest.raises(UserError, match=r"attention has 1 entries and model\.block_out_channels 2"):
        model.build(bad)
