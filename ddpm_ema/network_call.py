"""How a network is called, diffusers' U-Net or (x_t, timesteps, labels) -> prediction, and how its tensors lie in memory."""

from collections.abc import Callable
from typing import TypeAlias

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

Predict: TypeAlias = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(x_t fp32 `[n, C, H, W]`, timesteps int64 `[n]`, labels int64 `[n]` or None) -> `[n, C or 2C, H, W]`."""


def predict(network: nn.Module, x_t: Tensor, timesteps: Tensor, labels: Tensor | None) -> Tensor:
    """One evaluation, also inside DDP: x_t `[n, C, H, W]`, timesteps and labels int64 `[n]` -> `[n, C or 2C, H, W]`."""
    if isinstance(network.module if isinstance(network, DistributedDataParallel) else network, UNet2DModel):
        return network(x_t, timesteps, class_labels=labels, return_dict=False)[0]  # type: ignore[no-any-return]
    return network(x_t, timesteps, labels)  # type: ignore[no-any-return]


def channels_last(network: nn.Module) -> nn.Module:
    """Puts tensors of four dimensions into channels-last memory order, in place: torch's own way fails where one has five."""
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
    return network
