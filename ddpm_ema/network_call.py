"""How a network is called: diffusers' U-Net in its way, a network of `model.factory` as (x_t, timesteps, labels) -> prediction."""

from __future__ import annotations

from diffusers import UNet2DModel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def predict(network: nn.Module, x_t: Tensor, timesteps: Tensor, labels: Tensor | None) -> Tensor:
    """One evaluation of a network, which may be inside DDP.

    Args:
        network: of `model.build` or of a diffusers folder.
        x_t: `[n, C, H, W]`.
        timesteps: int64 `[n]`.
        labels: int64 `[n]`; None for a network without classes.

    Returns:
        `[n, C, H, W]`, or `[n, 2C, H, W]` for a learned variance.
    """
    inner = network.module if isinstance(network, DistributedDataParallel) else network
    if isinstance(inner, UNet2DModel):
        output: Tensor = network(x_t, timesteps, class_labels=labels, return_dict=False)[0]
        return output
    prediction: Tensor = network(x_t, timesteps, labels)
    return prediction
