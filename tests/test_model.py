"""The network: the paper's by default, a function of the settings alone, and clear about settings that do not fit."""

import math
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel

from ddpm_ema import config, model
from ddpm_ema.errors import UserError

SMALL = {"block_out_channels": [8, 16], "attention": [False, True], "norm_num_groups": 4, "layers_per_block": 1}


def settings(**sections: Any) -> config.Config:
    return config.validate({"data": {"image_size": 8, "channels": 3}, "model": SMALL, **sections})


@pytest.fixture(scope="module")
def papers_network() -> UNet2DModel:
    return model.build(config.validate({"data": {"image_size": 32, "channels": 3}}))


def test_the_defaults_are_the_papers_cifar10_network(papers_network: UNet2DModel) -> None:
    network = papers_network
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
    changes = {"class_conditional": True, "initialization": "pytorch"}  # the paper's says zero, whatever the class
    network = model.build(settings(model={**SMALL, **changes}), num_classes=10)
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


@pytest.mark.parametrize("initialization", ["ddpm", "pytorch"])
def test_first_weights_depend_on_the_seed_alone_and_leave_the_generator_as_it_was(initialization: str) -> None:
    section = {**SMALL, "initialization": initialization}
    torch.manual_seed(1)
    first = model.build(settings(model=section)).state_dict()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = model.build(settings(model=section)).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = model.build(settings(model=section, seed=1)).state_dict()
    assert not torch.equal(first["conv_in.weight"], other["conv_in.weight"])


# fan-in, fan-out and scale of one layer of each kind, by hand from the paper's code: channels times the kernel's area
LAYERS = {
    "conv_in": (3 * 9, 128 * 9, 1),
    "time_embedding.linear_1": (128, 512, 1),
    "time_embedding.linear_2": (512, 512, 1),
    "down_blocks.1.resnets.0.conv1": (128 * 9, 256 * 9, 1),
    "down_blocks.1.resnets.0.time_emb_proj": (512, 256, 1),
    "down_blocks.1.resnets.0.conv2": (256 * 9, 256 * 9, 1e-10),
    "down_blocks.1.resnets.0.conv_shortcut": (128, 256, 1),
    "down_blocks.1.attentions.1.to_q": (256, 256, 1),
    "down_blocks.1.attentions.1.to_k": (256, 256, 1),
    "down_blocks.1.attentions.1.to_v": (256, 256, 1),
    "down_blocks.1.attentions.1.to_out.0": (256, 256, 1e-10),
    "down_blocks.0.downsamplers.0.conv": (128 * 9, 128 * 9, 1),
    "mid_block.attentions.0.to_out.0": (256, 256, 1e-10),
    "up_blocks.3.resnets.2.conv2": (128 * 9, 128 * 9, 1e-10),
    "up_blocks.0.upsamplers.0.conv": (256 * 9, 256 * 9, 1),
    "conv_out": (128 * 9, 3 * 9, 1e-10),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_first_weights_are_uniform_with_the_papers_variance(papers_network: UNet2DModel, layer: str) -> None:
    """Variance scale / ((fan-in + fan-out) / 2): Ho et al. 2020, `default_init` of their code."""
    fan_in, fan_out, scale = LAYERS[layer]
    variance = scale / ((fan_in + fan_out) / 2)
    weight = papers_network.get_parameter(f"{layer}.weight").detach().double()
    standard_error = math.sqrt(variance / weight.numel())
    assert abs(weight.mean()) < 5 * standard_error
    # The mean square of n uniform numbers varies by variance * sqrt(0.8 / n): their kurtosis is 1.8.
    assert float(weight.square().mean()) == pytest.approx(variance, rel=5 * math.sqrt(0.8 / weight.numel()))
    limit = math.sqrt(3 * variance)
    assert 0.99 * limit < float(weight.abs().max()) <= limit * (1 + 1e-6)


def test_near_zero_are_the_last_layers_of_all_branches_and_no_others(papers_network: UNet2DModel) -> None:
    matrices = {name: p for name, p in papers_network.named_parameters() if p.ndim > 1}
    near_zero = {name.removesuffix(".weight") for name, p in matrices.items() if p.abs().max() < 1e-4}
    blocks = {name for name, module in papers_network.named_modules() if type(module).__name__ == "ResnetBlock2D"}
    attentions = {name for name, module in papers_network.named_modules() if type(module).__name__ == "Attention"}
    assert (len(blocks), len(attentions)) == (22, 6)
    assert near_zero == {f"{b}.conv2" for b in blocks} | {f"{a}.to_out.0" for a in attentions} | {"conv_out"}


def test_biases_start_at_zero_and_norms_at_one(papers_network: UNet2DModel) -> None:
    for name, parameter in papers_network.named_parameters():
        if parameter.ndim == 1:
            expected = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            assert parameter.unique().tolist() == [expected], name


def test_class_embeddings_start_standard_normal() -> None:
    network = model.build(settings(model={**SMALL, "class_conditional": True}), num_classes=999)
    values = network.class_embedding.weight.detach().double()
    assert values.shape == (1000, 32)
    assert abs(values.mean()) < 5 / math.sqrt(32_000)
    assert float(values.var()) == pytest.approx(1, abs=5 * math.sqrt(2 / 32_000))
    assert float(values.abs().max()) > 3


@torch.no_grad()
def test_an_untrained_network_predicts_zero() -> None:
    output = model.build(settings())(torch.randn(4, 3, 8, 8), torch.tensor([0, 10, 500, 999])).sample
    assert float(output.abs().max()) < 1e-3


def test_a_layers_first_weights_depend_on_its_name_and_not_on_the_layers_around_it() -> None:
    small = dict(model.build(settings()).named_parameters())
    larger = {**SMALL, "block_out_channels": [8, 16, 16], "attention": [True, True, True], "layers_per_block": 2}
    deep = dict(model.build(settings(model=larger)).named_parameters())
    shared = [name for name in small if name in deep and small[name].shape == deep[name].shape and "conv" in name]
    assert len(shared) > 20
    assert all(torch.equal(small[name], deep[name]) for name in shared)
    signs = [tuple((p.flatten()[:64] > 0).tolist()) for p in deep.values() if p.ndim > 1 and p.numel() >= 64]
    assert len(set(signs)) == len(signs), "no two layers draw the same numbers"


def test_pytorch_leaves_the_first_weights_as_diffusers_draws_them() -> None:
    network = model.build(settings(model={**SMALL, "initialization": "pytorch"}))
    limit = 1 / math.sqrt(8 * 9)  # torch's Conv2d: uniform with bound 1 / sqrt(fan-in), biases too
    for parameter in (network.conv_out.weight, network.conv_out.bias):
        assert 0.3 * limit < float(parameter.detach().abs().max()) <= limit


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
