"""Copies between host and device that nobody waits for, which on CUDA takes pinned host memory and events."""

from collections.abc import Callable

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`, without waiting; it may not be written to before it was read there."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # of torch's own cache: the block is used again once it was read
    return tensor.to(device, non_blocking=True)


def to_host(tensor: Tensor) -> tuple[Tensor, Callable[[], bool]]:
    """`tensor` on the CPU, and whether it is there yet: its values may be read once that is true."""
    copy = tensor.to("cpu", non_blocking=True)  # into pinned memory, if it comes from CUDA
    if tensor.device.type != "cuda":
        return copy, lambda: True
    event = torch.cuda.Event()
    event.record()
    return copy, event.query
