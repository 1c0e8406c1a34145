"""The arithmetic of an update, over many tensors and many averages at once. Nothing here waits for a device."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ddpm_ema.averaging.naming import parts

_CAST_NUMEL = 1 << 23
"""Most elements of lower precision that are held as fp32 at once on an accelerator: 32 MiB. On the CPU: one tensor."""


def lerp_(averages: Sequence[Sequence[Tensor]], sources: Sequence[Tensor], weights: Sequence[float]) -> None:
    """averages[k][i] += weights[k] * (sources[i] - averages[k][i]) in place, in fp32.

    All averages of one tensor are updated in succession: a source is read from memory once and from the cache for the other
    averages, which is faster than one pass per average. On an accelerator everything is one fused kernel.

    Averages [num_averages][num_tensors] are fp32, sources [num_tensors] of any floating dtype. A weight of 0 leaves an average
    unchanged and 1 copies the source, both exactly (NaN included).
    """
    moving = [(average, weight) for average, weight in zip(averages, weights, strict=True) if 0.0 < weight < 1.0]
    with torch.no_grad():
        for average, weight in zip(averages, weights, strict=True):
            if weight >= 1.0 and sources:  # a rule's rounding may be above
                torch._foreach_copy_(list(average), list(sources))
        if not moving:
            return
        for indices, group in _fp32_groups(sources):
            torch._foreach_lerp_(
                [average[i] for i in indices for average, _ in moving],
                [source for source in group for _ in moving],
                [weight for _ in group for _, weight in moving],
            )


def _fp32_groups(sources: Sequence[Tensor]) -> Iterator[tuple[list[int], list[Tensor]]]:
    """Indices and fp32 values of the sources: all fp32 ones at once, the others converted in bounded parts."""
    if native := [i for i, source in enumerate(sources) if source.dtype is torch.float32]:
        yield native, [sources[i] for i in native]
    lower = {i: source.numel() for i, source in enumerate(sources) if source.dtype is not torch.float32}
    limit = 0 if all(source.is_cpu for source in sources) else _CAST_NUMEL
    for part in parts(lower, limit):
        yield part, [sources[i].float() for i in part]


def squared_norm(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """Sum of squares of all elements, float64 [] on `device`; of an iterator one tensor is in memory at a time."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    with torch.no_grad():
        for tensor in tensors:
            norm = torch.linalg.vector_norm(tensor, dtype=torch.float64)
            total = total + norm.square().to(device, non_blocking=True)
    return total
