"""Where the copies live: one block of memory a copy, on huge pages where the system has them."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Mapping

import torch
from torch import Tensor

_ALIGNMENT = 16
"""fp32 elements that a tensor's start is a multiple of: 64 bytes, a cache line."""
_HUGE_PAGE = 2 << 20
"""Bytes. Smaller copies have nothing to gain."""


def fp32_copies(sources: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy of each tensor in fp32, with its layout and on its device.

    The copies on the CPU share one block. An update runs through all of it, a few gigabytes of averages in the usual case, and
    on 4 KiB pages a good tenth of its time goes into address translation.
    """
    with torch.no_grad():
        copies = {
            name: torch.empty_like(source, dtype=torch.float32, device="meta") for name, source in sources.items()
        }
        offsets: dict[str, int] = {}
        total = 0
        for name, source in sources.items():
            if source.device.type == "cpu":
                offsets[name] = total
                total += -(-source.numel() // _ALIGNMENT) * _ALIGNMENT
        block = _block(total)
        for name, source in sources.items():
            like = copies[name]  # its strides are the source's, or dense where the source's are not
            if name in offsets:
                copies[name] = block.as_strided(like.shape, like.stride(), offsets[name])
            else:
                copies[name] = torch.empty_strided(like.shape, like.stride(), dtype=torch.float32, device=source.device)
            copies[name].copy_(source)
    return copies


def _block(numel: int) -> Tensor:
    """fp32 [numel] on the CPU, not initialised."""
    num_bytes = numel * 4
    if num_bytes < _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(numel, dtype=torch.float32)
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages gives ordinary ones
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.float32)  # keeps the pages alive
