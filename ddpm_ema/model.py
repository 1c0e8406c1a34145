"""Settings to a network: the U-Net of Ho et al. 2020, https://arxiv.org/abs/2006.11239, appendix B, or one of `model.factory`."""

import hashlib
import importlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from traceback import extract_tb

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from ddpm_ema import keyed_random, network_call
from ddpm_ema.averaging.naming import check_tensors
from ddpm_ema.config import Config
from ddpm_ema.errors import UserError, explained, nearest, one_line
from ddpm_ema.keyed_random import Purpose

# Where a residual branch or the network ends: Ho et al. start these layers at the variance scale 1e-10.
NEAR_ZERO = ("conv2", "to_out.0", "conv_out")
# Of google/ddpm-cifar10-32; diffusers has other defaults.
PAPER_LAYOUT = {"norm_eps": 1e-6, "flip_sin_to_cos": False, "freq_shift": 1, "downsample_padding": 0}
NO_LABEL = "_ddpm_ema_no_label"  # attribute of a factory's network, whose own names are its author's


def build(config: Config, num_classes: int | None = None) -> nn.Module:
    """The untrained network, fp32 on the CPU; its weights are a function of the settings and `config.seed` alone.

    The default settings with 3 channels give the network of google/ddpm-cifar10-32 (35,746,307 parameters). With `model.factory` it
    is what that function returns, whose first weights come from torch's generator, seeded by `config.seed`.

    It takes labels with `model.class_conditional`, and `num_classes` among them means "no label"; `network_call.predict` calls it.
    Raises UserError that lists every setting which does not fit the others, or where the factory makes no such network.
    """
    if problems := list(_problems(config, num_classes)):
        raise UserError("\n".join(["the network cannot be built:", *(f"  {problem}" for problem in problems)]))
    if config.model.factory is not None:
        return _made(config, num_classes)
    model, channels = config.model, config.data.channels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(keyed_random.seed_for(config.seed, Purpose.INIT, 0))
        network = UNet2DModel(
            sample_size=config.data.image_size,
            in_channels=channels,
            out_channels=2 * channels if config.diffusion.variance == "learned" else channels,
            block_out_channels=model.block_out_channels,
            down_block_types=tuple("AttnDownBlock2D" if here else "DownBlock2D" for here in model.attention),
            up_block_types=tuple("AttnUpBlock2D" if here else "UpBlock2D" for here in reversed(model.attention)),
            layers_per_block=model.layers_per_block,
            attention_head_dim=model.attention_head_dim,
            norm_num_groups=model.norm_num_groups,
            dropout=model.dropout,
            num_class_embeds=num_classes + 1 if model.class_conditional and num_classes is not None else None,
            **(PAPER_LAYOUT if model.layout == "ddpm" else {}),
        )
    if model.initialization == "ddpm":
        _initialize(network, config.seed)
    return network


def _made(config: Config, num_classes: int | None) -> nn.Module:
    """What `model.factory` returns, asked once for a prediction, so that a misfit is one message and not the first step's."""
    data, where = config.data, f"model.factory {config.model.factory}"
    classes = num_classes if config.model.class_conditional else None
    outputs = data.channels * (2 if config.diffusion.variance == "learned" else 1)
    shape = {"image_size": data.image_size, "channels": data.channels, "out_channels": outputs, "num_classes": classes}
    # The first and the last of what it will be given, in the memory order that it will have.
    x_t = torch.ones(2, data.channels, data.image_size, data.image_size).contiguous(memory_format=torch.channels_last)
    timesteps = torch.tensor([0, config.diffusion.num_train_timesteps - 1])
    labels = None if classes is None else torch.tensor([0, classes])
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(keyed_random.seed_for(config.seed, Purpose.INIT, 0))
            network = _imported(str(config.model.factory))(**shape)
            if not isinstance(network, nn.Module):
                raise UserError(f"{where}: returned {type(network).__name__}, no torch.nn.Module")
            found = network_call.predict(network.float().eval(), x_t, timesteps, labels)
    except UserError:
        raise
    except Exception as error:  # its code may do anything
        library = torch.__path__[0]
        at = [at for at in extract_tb(error.__traceback__) if not Path(at.filename).is_relative_to(library)][-1]
        told = f"{type(error).__name__}, {one_line(error)} (line {at.lineno} of {at.filename})"
        raise UserError(f"{where}: {told}; docs/extending.md says how it and its network are called") from error
    got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
    if got != (wanted := (2, outputs, *x_t.shape[2:])):
        raise UserError(f"{where}: its network returned {got} for x_t {tuple(x_t.shape)}, expected {wanted}")
    if not bool((x_t == 1).all()):
        raise UserError(f"{where}: its network writes to x_t, which the sampler goes on with: let it work on a copy")
    setattr(network, NO_LABEL, classes)
    return network.train()


def _imported(name: str) -> Callable[..., object]:
    """The function `package.module:function`, also of a module in the working directory."""
    module_name, _, function_name = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # last: it hides no installed module
    advice = "; it must be installed, or lie below the working directory"
    with explained(f"model.factory {name}: ", ModuleNotFoundError, after=advice):
        module = importlib.import_module(module_name)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(
            f"model.factory {name}: {module_name} has no such function{nearest(function_name, vars(module))}"
        )
    return function  # type: ignore[no-any-return]


@torch.no_grad()
def _initialize(network: UNet2DModel, seed: int) -> None:
    """Initial weights as in the code of Ho et al. 2020 (https://github.com/hojonathanho/diffusion, `nn.py` and `unet.py`).

    Weights are uniform with variance scale / fan_avg (Glorot & Bengio 2010), scale 1 or near zero; biases are zero.
    That code has no classes; class embeddings are standard normal, as in Nichol & Dhariwal 2021. Each weight depends only on the
    seed and its own name, not on other layers or torch's generators.
    """
    for name, module in network.named_modules():
        match module:
            case nn.Conv2d() | nn.Linear():
                weight = module.weight
                fan_avg = (weight.shape[0] + weight.shape[1]) * weight[0, 0].numel() / 2
                limit = math.sqrt(3 * (1e-10 if name.endswith(NEAR_ZERO) else 1.0) / fan_avg)
                words = keyed_random.words(seed, Purpose.INIT, _key(name), torch.arange(len(weight)), weight[0].numel())
                weight.copy_(limit * ((words.double() + 0.5) * 2.0**-31 - 1).float().view_as(weight))
                if module.bias is not None:
                    module.bias.zero_()
            case nn.Embedding():
                rows = torch.arange(module.num_embeddings)
                module.weight.copy_(keyed_random.normal(seed, Purpose.INIT, _key(name), rows, (module.embedding_dim,)))
            case nn.GroupNorm():
                module.reset_parameters()  # weights 1, biases 0
            case _:
                assert not list(module.parameters(recurse=False)), f"{name}: no rule for the first weights of {module}"


def _key(name: str) -> int:
    """A layer's name as a 64-bit number."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def fitting(
    config: Config, weights: Mapping[str, Tensor], where: str, num_classes: Callable[[], int | None] = lambda: None
) -> nn.Module:
    """The network that these weights are of, not loaded with them.

    A U-Net's classes are counted by the weights; `num_classes` is asked for those of a class-conditional factory's network.

    Raises:
        UserError: the settings' network lacks a tensor, or has another; each is named, and `where` they are from.
    """
    labels = weights.get("class_embedding.weight")
    classes = None if labels is None else len(labels) - 1
    if config.model.factory is not None:
        classes = num_classes() if config.model.class_conditional else None
    network = build(config, classes)
    with explained("not of the network that the settings describe: ", ValueError):
        check_tensors(weights, {name: tensor.shape for name, tensor in network.state_dict().items()}, where)
    return network


def no_label(network: nn.Module) -> int | None:
    """The class that means "no label" to a class-conditional network; None for an unconditional one."""
    if not isinstance(network, UNet2DModel):
        return getattr(network, NO_LABEL, None)
    num_class_embeds: int | None = dict(network.config)["num_class_embeds"]
    return None if num_class_embeds is None else num_class_embeds - 1


def _problems(config: Config, num_classes: int | None) -> Iterator[str]:
    """Settings that do not fit each other or the data: one line per setting, with what to do."""
    model, size = config.model, config.data.image_size
    channels, head = model.block_out_channels, model.attention_head_dim
    if model.class_conditional and num_classes is None:
        yield "model.class_conditional: this data set has no labels: set it to false, or take labelled data"
    if model.factory is not None:
        return
    if uneven := [n for n in channels if n % model.norm_num_groups]:
        yield (
            f"model.norm_num_groups: {model.norm_num_groups} does not divide {', '.join(map(str, uneven))} of "
            "model.block_out_channels: lower it, or make the channels its multiples"
        )
    # The middle block, at the coarsest resolution, always has attention.
    attending = {n for n, here in zip(channels, model.attention, strict=True) if here} | {channels[-1]}
    if head is not None and (uneven := sorted(n for n in attending if n % head)):
        yield f"model.attention_head_dim: {head} does not divide {', '.join(map(str, uneven))} channels, which have attention"
    if channels[0] % 2:
        yield f"model.block_out_channels: the first, {channels[0]}, must be even for the time embedding"
    stride = 2 ** (len(channels) - 1)
    if size % stride:
        yield (
            f"data.image_size: {size} is not a multiple of {stride}, by which {len(channels)} resolutions scale it down: "
            f"take {-(-size // stride) * stride}, or fewer model.block_out_channels"
        )
