"""Tensors that `fully_shard` or DTensor split over processes: local shards, whole tensors, and copies between the two."""

import math
import sys
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether this is a DTensor, sharded or replicated. Does not import torch.distributed.tensor."""
    return hasattr(tensor, "placements")


def check_parameter(name: str, tensor: Any) -> None:
    """Raises ValueError for parameters without a value on this process."""
    if hasattr(tensor, "ds_id"):
        raise ValueError(
            f"parameter {name!r} is partitioned by DeepSpeed's ZeRO stage 3, which leaves it empty between steps: use stage 1 or "
            "2, or torch's fully_shard"
        )
    if is_sharded(tensor) and any(placement.is_partial() for placement in tensor.placements):
        raise ValueError(
            f"parameter {name!r} is placed as {tensor.placements}, a sum that is not taken yet: redistribute() it to Shard or "
            "Replicate first"
        )


def local(tensor: Any) -> Tensor:
    """What this process holds of a tensor; writing to it writes to the tensor. Call it under no_grad, where it is cheap."""
    found: Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return found


def whole(tensor: Any) -> Tensor:
    """The whole tensor on every process. Collective if it is sharded: one all-gather on its mesh's devices."""
    if is_sharded(tensor):
        tensor = tensor.detach().to(tensor.device_mesh.device_type).full_tensor()
    found: Tensor = tensor.detach()
    return found


def assign(target: Any, value: Any) -> None:
    """target.copy_(value) for any two kinds of tensor; of a whole value each process takes its shard, which sends nothing.

    Raises ValueError where the two are on different meshes.
    """
    with torch.no_grad():
        if is_sharded(target) and is_sharded(value) and target.device_mesh != value.device_mesh:
            raise ValueError(
                f"{value.device_mesh} holds the value and {target.device_mesh} the target: pass whole tensors (gather_all)"
            )
        if is_sharded(target) and not is_sharded(value):
            from torch.distributed.tensor import distribute_tensor

            value = distribute_tensor(value.detach(), target.device_mesh, target.placements, src_data_rank=None)
        target.copy_(value if is_sharded(target) else whole(value))


def is_first(tensor: Any) -> bool:
    """Whether this process is the first of a DTensor's mesh; of any other tensor every process is."""
    return not is_sharded(tensor) or not any(tensor.device_mesh.get_coordinate() or (1,))


def num_replicas(tensor: Any) -> int:
    """Number of processes that hold the same shard of a tensor; 1 for one that is no DTensor."""
    placed = zip(tensor.device_mesh.shape, tensor.placements, strict=True) if is_sharded(tensor) else ()
    return math.prod(size for size, placement in placed if placement.is_replicate())


def reshard(module: nn.Module) -> None:
    """Make FSDP's modules show their shards: after a forward pass alone they hold whole copies, and writing to those is lost."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for part in module.modules() if fsdp else ():
        if isinstance(part, fsdp.FSDPModule):  # type: ignore[union-attr]
            part.reshard()
