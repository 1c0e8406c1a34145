"""Features of one copy's images, block by block on disk, so that a scoring that was killed goes on with what is done.

A block is what all processes together finished in one round: which images, their features, logits and the seconds it took.
It says which images it holds, so the next start may use any number of processes and any batch size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ddpm_ema.errors import UserError
from ddpm_ema.processes import say
from ddpm_ema.rundir import atomic_save, read_tensors


@dataclass
class Block:
    """Some images of one copy, CPU tensors: `indices` int64 `[n]`, `features` float32 `[n, d]`, `logits` float32 `[n, k]` or
    none, and the images themselves, uint8 `[m, C, H, W]`, of those that the grid shows (`shown` int64 `[m]`)."""

    indices: Tensor
    features: Tensor
    logits: Tensor | None
    shown: Tensor
    images: Tensor
    seconds: float = 0.0

    def __len__(self) -> int:
        return len(self.indices)

    @classmethod
    def join(cls, blocks: Iterable[Block]) -> Block:
        """One block, images in order."""
        blocks = list(blocks)
        indices = torch.cat([block.indices for block in blocks])
        shown = torch.cat([block.shown for block in blocks])
        order, shown_order = indices.argsort(), shown.argsort()
        logits = [block.logits for block in blocks if block.logits is not None]
        return cls(
            indices=indices[order],
            features=torch.cat([block.features for block in blocks])[order],
            logits=torch.cat(logits)[order] if logits else None,
            shown=shown[shown_order],
            images=torch.cat([block.images for block in blocks])[shown_order],
            seconds=sum(block.seconds for block in blocks),
        )

    def first(self, count: int) -> Block:
        """Images 0 ... count - 1."""
        kept = self.indices < count
        logits = None if self.logits is None else self.logits[kept]
        seconds = self.seconds * float(kept.double().mean()) if len(self) else 0.0
        return Block(self.indices[kept], self.features[kept], logits, self.shown, self.images, seconds)

    def to_tensors(self) -> dict[str, Tensor]:
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return {**tensors, "seconds": torch.tensor([self.seconds], dtype=torch.float64)}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Block:
        """Raises ValueError for what is no block."""
        try:
            block = cls(
                indices=tensors["indices"],
                features=tensors["features"],
                logits=tensors.get("logits"),
                shown=tensors["shown"],
                images=tensors["images"],
                seconds=float(tensors["seconds"]),
            )
        except KeyError as error:
            raise ValueError(f"no {error} in it") from None
        if len(block.features) != len(block) or len(block.shown) != len(block.images):
            raise ValueError("its parts have different lengths")
        if not bool(torch.isfinite(block.features).all()):
            raise ValueError("its features are not finite")
        return block


class MemoryStore:
    """Blocks held in memory only: for scoring while training."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []

    def add(self, block: Block) -> None:
        self.blocks.append(block)

    def done(self) -> set[int]:
        """The images there are."""
        return {index for block in self.blocks for index in block.indices.tolist()}

    def block(self) -> Block:
        """All of them, in order."""
        return Block.join(self.blocks)


class DiskStore(MemoryStore):
    """Blocks kept in `folder`, too, each whole or not at all. A damaged file is named, and its images are made again."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        for partial in folder.glob(".*.partial"):  # what a kill left; whoever reads this folder holds its lock
            partial.unlink(missing_ok=True)
        taken: set[int] = set()
        for path in sorted(folder.glob("block-*.safetensors")):
            try:
                block = Block.from_tensors(read_tensors(path))
                images = set(block.indices.tolist())
                if images & taken or len(images) != len(block):
                    raise ValueError("it repeats images of another block")
            except (UserError, ValueError) as error:
                say(f"warning: {path}: {error}; its images are made again")
                path.unlink(missing_ok=True)
                continue
            taken |= images
            self.blocks.append(block)

    def add(self, block: Block) -> None:
        super().add(block)
        first, last = int(block.indices[0]), int(block.indices[-1])
        try:
            atomic_save(self.folder / f"block-{first:09d}-{last:09d}-{len(block)}.safetensors", block.to_tensors())
        except OSError as error:
            raise UserError(
                f"{self.folder}: cannot be written ({error.strerror}); what was scored before is whole: make room, "
                "start again"
            ) from None

    @staticmethod
    def clear_folder(folder: Path) -> None:
        """Deletes a copy's blocks: its row is on disk and nothing more will be asked of its features."""
        for path in folder.glob("block-*.safetensors"):
            path.unlink(missing_ok=True)
