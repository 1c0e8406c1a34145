"""Collect tensors that are split over ranks, one at a time."""

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor


def require_group(world_size: int, group: dist.ProcessGroup | None) -> None:
    """Raises ValueError where torch.distributed is not initialised, or the group's size is not `world_size`."""
    split = f"gather: the bank is split over {world_size} processes"
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(f"{split}, but torch.distributed is not initialised")
    if dist.get_world_size(group) != world_size:
        raise ValueError(f"{split}, the group has {dist.get_world_size(group)}")


def collect(
    owned: Mapping[str, Tensor],
    owners: Mapping[str, int],
    shapes: Mapping[str, torch.Size],
    rank: int,
    dst: int | None,
    group: dist.ProcessGroup | None,
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor on rank `dst`, or on all for None, as a contiguous clone on the backend's device. Collective.

    Every rank exhausts the iterator, which is empty on ranks that receive nothing. At most one tensor is in flight. `owned` are
    this rank's; `owners`, name -> rank, have the same order on every rank; `rank` and `dst` count within the group.
    """
    cuda = "nccl" in dist.get_backend(group)
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    of_world = list(range(dist.get_world_size())) if group is None else dist.get_process_group_ranks(group)
    for name, owner in owners.items():
        if rank == owner:
            tensor = owned[name].detach().to(device, copy=True, memory_format=torch.contiguous_format)
        elif dst in (None, rank):
            tensor = torch.empty(shapes[name], dtype=torch.float32, device=device)
        else:
            continue
        if dst is None:
            dist.broadcast(tensor, of_world[owner], group=group)
        elif rank != dst:
            dist.send(tensor, of_world[dst], group=group)
        elif rank != owner:
            dist.recv(tensor, of_world[owner], group=group)
        if dst in (None, rank):
            yield name, tensor
