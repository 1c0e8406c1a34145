"""A small diffusion transformer (Peebles & Xie 2022, https://arxiv.org/abs/2212.09748) for `model.factory: examples.dit:small`."""

import math

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """Attention and an MLP, shifted, scaled and gated by the conditioning vector; gates start at zero (adaLN-Zero)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight), nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate, shift_2, scale_2, gate_2 = self.modulation(condition)[:, None].chunk(
            6, dim=2
        )  # [n, 1, width] each
        h = self.norm(x) * (1 + scale) + shift
        x = x + gate * self.attention(h, h, h, need_weights=False)[0]
        return x + gate_2 * self.mlp(self.norm(x) * (1 + scale_2) + shift_2)


class DiT(nn.Module):
    """x_t `[n, C, H, W]`, timesteps int64 `[n]`, labels int64 `[n]` or None -> `[n, out_channels, H, W]`."""

    def __init__(self, size: int, channels: int, outputs: int, classes: int | None, width: int, depth: int) -> None:
        super().__init__()
        self.size, self.outputs, self.width = size, outputs, width
        self.patches = nn.Conv2d(channels, width, 2, stride=2)
        self.positions = nn.Parameter(0.02 * torch.randn((size // 2) ** 2, width))
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.label = None if classes is None else nn.Embedding(classes + 1, width)  # the last means: no label
        self.blocks = nn.ModuleList(Block(width, width // 16) for _ in range(depth))
        self.pixels = nn.Linear(width, 4 * outputs)

    def forward(self, x_t: Tensor, timesteps: Tensor, labels: Tensor | None) -> Tensor:
        frequencies = torch.exp(-math.log(1e4) * torch.arange(self.width // 2, device=x_t.device) / (self.width // 2))
        angles = timesteps[:, None] * frequencies  # [n, width / 2]
        condition = self.time(torch.cat([angles.cos(), angles.sin()], dim=1))
        if self.label is not None:
            condition = condition + self.label(labels)
        x = self.patches(x_t).flatten(2).transpose(1, 2) + self.positions  # [n, patches, width]
        for block in self.blocks:
            x = block(x, condition)
        rows = self.size // 2
        x = self.pixels(x).reshape(-1, rows, rows, self.outputs, 2, 2)
        return x.permute(0, 3, 1, 4, 2, 5).reshape(-1, self.outputs, self.size, self.size)


def small(image_size: int, channels: int, out_channels: int, num_classes: int | None) -> nn.Module:
    """0.5 M parameters: what `model.factory` calls."""
    return DiT(image_size, channels, out_channels, num_classes, width=96, depth=3)
