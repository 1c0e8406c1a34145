"""Collect tensors that are split over ranks, one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class SplitTensors:
    """This rank's part of tensors that are split over the ranks of a process group. Both methods are collectives.

    Attributes:
        owned: name -> tensor, of this rank.
        owners: name -> rank, in the same order on every rank.
        parameters: name -> parameter of the model, for its shape and device.
        rank: this process in the group.
        group: process group, None for the default one.
    """

    owned: Mapping[str, Tensor]
    owners: Mapping[str, int]
    parameters: Mapping[str, Tensor]
    rank: int
    group: dist.ProcessGroup | None

    def to_one(self, dst: int) -> Iterator[tuple[str, Tensor]]:
        """Every tensor on rank `dst`, in the order of `owners`, as new fp32 CPU tensors; nothing on the other ranks.

        `dst` must exhaust the iterator; the other ranks send during the call. At most one tensor is in flight.
        """
        if self.rank == dst:
            return self._receive()
        for name, owner in self.owners.items():
            if owner == self.rank:
                dist.send(self._to_send(name), self._global(dst), group=self.group)
        return iter(())

    def _receive(self) -> Iterator[tuple[str, Tensor]]:
        for name, owner in self.owners.items():
            if owner == self.rank:
                yield name, self.owned[name].detach().cpu().contiguous().clone()
                continue
            buffer = self._buffer(name)
            dist.recv(buffer, self._global(owner), group=self.group)
            yield name, buffer.cpu()

    def to_all(self) -> dict[str, Tensor]:
        """Every tensor on every rank, fp32, each on its parameter's device: one broadcast by each tensor's owner."""
        gathered: dict[str, Tensor] = {}
        for name, owner in self.owners.items():
            tensor = self._to_send(name) if owner == self.rank else self._buffer(name)
            dist.broadcast(tensor, self._global(owner), group=self.group)
            gathered[name] = tensor.to(self.parameters[name].device)
        return gathered

    def require_group(self, world_size: int) -> None:
        """Raises ValueError where torch.distributed is not initialised, or the group's size is not `world_size`."""
        split = f"gather: the bank is split over {world_size} processes"
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(f"{split}, but torch.distributed is not initialised")
        if dist.get_world_size(self.group) != world_size:
            raise ValueError(f"{split}, the group has {dist.get_world_size(self.group)}")

    def _to_send(self, name: str) -> Tensor:
        """A contiguous clone on a device that the backend can send from."""
        return self.owned[name].detach().to(self._device(), copy=True, memory_format=torch.contiguous_format)

    def _buffer(self, name: str) -> Tensor:
        return torch.empty(self.parameters[name].shape, dtype=torch.float32, device=self._device())

    def _device(self) -> torch.device:
        cuda = "nccl" in dist.get_backend(self.group)
        return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")

    def _global(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)
