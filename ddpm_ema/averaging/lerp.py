"""The one operation behind every average, over many tensors and many copies at once. Never waits for a device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_CAST_NUMEL = 1 << 23
"""Most elements of lower precision that are held as fp32 at once on an accelerator: 32 MiB. On the CPU it is one tensor."""


def lerp_(copies: Sequence[Sequence[Tensor]], sources: Sequence[Tensor], weights: Sequence[float]) -> None:
    """copies[k][i] += weights[k] * (sources[i] - copies[k][i]) in place, in fp32.

    Tensor by tensor, all copies of one tensor together: a source is read from memory once and from the cache for the other
    copies, which is what makes this faster than one pass a copy. On an accelerator it is one fused kernel for everything.

    Args:
        copies: [num_copies][num_tensors] fp32.
        sources: [num_tensors], shapes as the copies', any floating dtype.
        weights: [num_copies] in [0, 1]. 0 leaves a copy alone and 1 copies, both exactly (a NaN does not spread).
    """
    moving = [(copy, weight) for copy, weight in zip(copies, weights, strict=True) if 0.0 < weight < 1.0]
    with torch.no_grad():
        for copy, weight in zip(copies, weights, strict=True):
            if weight == 1.0 and sources:
                torch._foreach_copy_(list(copy), list(sources))
        if not moving:
            return
        for indices, group in _fp32_groups(sources):
            torch._foreach_lerp_(
                [copy[i] for i in indices for copy, _ in moving],
                [source for source in group for _ in moving],
                [weight for _ in group for _, weight in moving],
            )


def _fp32_groups(sources: Sequence[Tensor]) -> Iterator[tuple[list[int], list[Tensor]]]:
    """Indices and fp32 values of the sources: all that are fp32 at once, the others converted a bounded part at a time."""
    native: dict[torch.device, list[int]] = {}
    lower: dict[torch.device, list[int]] = {}
    for i, source in enumerate(sources):
        groups = native if source.dtype is torch.float32 else lower
        groups.setdefault(source.device, []).append(i)
    for indices in native.values():
        yield indices, [sources[i] for i in indices]
    for device, indices in lower.items():
        limit = 0 if device.type == "cpu" else _CAST_NUMEL
        for part in _parts(indices, sources, limit):
            yield part, [sources[i].float() for i in part]


def _parts(indices: Sequence[int], sources: Sequence[Tensor], limit: int) -> Iterator[list[int]]:
    """Consecutive runs of indices with at most `limit` elements, or of one tensor if that alone has more."""
    part: list[int] = []
    numel = 0
    for i in indices:
        if part and numel + sources[i].numel() > limit:
            yield part
            part, numel = [], 0
        part.append(i)
        numel += sources[i].numel()
    if part:
        yield part


def squared_norm(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Sum of squares of all elements, float64 [] on `device`, without a host synchronisation."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    with torch.no_grad():
        for tensor in tensors:
            norm = torch.linalg.vector_norm(tensor, dtype=torch.float64)
            total = total + norm.square().to(device, non_blocking=True)
    return total


def squared_distance(copies: Sequence[Tensor], sources: Sequence[Tensor], device: torch.device) -> Tensor:
    """Sum of (copy - source)^2 over all elements, float64 [] on `device`, one tensor's difference in memory at a time."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    with torch.no_grad():
        for copy, source in zip(copies, sources, strict=True):
            norm = torch.linalg.vector_norm(copy - source, dtype=torch.float64)
            total = total + norm.square().to(device, non_blocking=True)
    return total
