"""Features of one set of weights, block by block on disk, so that a scoring that was killed goes on with what is done.

A block is what all processes together finished in one round: which images, their features, logits and the seconds it took.
It says which images it holds, so the next start may use any number of processes and any batch size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_ema.averaging.files import save_tensors
from ddpm_ema.errors import UserError
from ddpm_ema.messages import logger
from ddpm_ema.rundir import as_user_error, read_tensors

KEPT = "What was scored before is whole"
FIRST_IMAGES = 16
"""Images of every set of weights that are stored as they are, and sampled in batches of their own on rank 0: sampled again
under the same versions they are equal to the byte, whatever the batch size and the number of processes."""
PER_IMAGE = ("indices", "features", "logits", "saturated", "contrast")


@dataclass
class Block:
    """Some images of one set of weights, CPU tensors.

    `indices` int64 `[n]`, `features` float32 `[n, d]`, `logits` float32 `[n, k]` or none; of each image's channel values the
    share at 0 or 255, `saturated` float32 `[n]`, and the largest less the smallest, `contrast` uint8 `[n]`; and some of the
    images themselves: `shown` int64 `[m]`, `images` uint8 `[m, C, H, W]`.
    """

    indices: Tensor
    features: Tensor
    logits: Tensor | None
    saturated: Tensor
    contrast: Tensor
    shown: Tensor
    images: Tensor
    seconds: float = 0.0

    def __len__(self) -> int:
        return len(self.indices)

    @classmethod
    def join(cls, blocks: Iterable[Block], indices: Tensor) -> Block:
        """The images `indices` (int64 `[n]`, ascending) of all blocks. Room is made once: beside it one block is held."""
        room: dict[str, Tensor] = {}
        shown, images, seconds = [], [], 0.0
        for block in blocks:
            kept = torch.isin(block.indices, indices)
            rows = torch.searchsorted(indices, block.indices[kept])
            for name in PER_IMAGE:
                value: Tensor | None = getattr(block, name)
                if value is None:
                    continue
                if name not in room:
                    room[name] = value.new_zeros(len(indices), *value.shape[1:])
                room[name].index_copy_(0, rows, value if kept.all() else value[kept])
            shown.append(block.shown.clone())  # a view would hold on to the whole file
            images.append(block.images.clone())
            seconds += block.seconds * len(rows) / max(1, len(block))
        order = torch.cat(shown).argsort()
        tensors: dict[str, Any] = {"logits": None, **room}
        return cls(**tensors, shown=torch.cat(shown)[order], images=torch.cat(images)[order], seconds=seconds)

    def repeats(self, other: Block) -> bool:
        """Whether both hold the same images, byte for byte, with the same features to rounding."""
        if not torch.equal(self.images, other.images) or self.features.shape != other.features.shape:
            return False
        rounding = 1e-3 * float(other.features.abs().max())
        return torch.allclose(self.features, other.features, rtol=1e-3, atol=rounding)

    def to_tensors(self) -> dict[str, Tensor]:
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return {**tensors, "seconds": torch.tensor([self.seconds], dtype=torch.float64)}

    @classmethod
    def read(cls, path: Path) -> Block:
        """Raises UserError or ValueError for what is no block."""
        tensors = read_tensors(path)
        try:
            seconds, logits = float(tensors.pop("seconds")), tensors.pop("logits", None)
            block = cls(**tensors, logits=logits, seconds=seconds)
        except (KeyError, TypeError) as error:
            raise ValueError(f"it is no block ({error})") from None
        lengths = {len(tensors[name]) for name in PER_IMAGE if name in tensors}
        if lengths != {len(block)} or len(block.shown) != len(block.images):
            raise ValueError("its parts have different lengths")
        if not torch.isfinite(block.features.sum(dtype=torch.float64)):
            raise ValueError("its features are not finite")
        return block


def pixel_figures(images: Tensor) -> tuple[Tensor, Tensor]:
    """`saturated` and `contrast` of uint8 images `[n, C, H, W]`: see Block."""
    values = images.flatten(1)
    saturated = ((values == 0) | (values == 255)).float().mean(dim=1)
    return saturated.cpu(), (values.amax(dim=1) - values.amin(dim=1)).cpu()


def first_images(folder: Path, count: int) -> Tensor | None:
    """uint8 `[m, C, H, W]`: the first images that are kept of a set of weights, at most `count`; None where they were lost."""
    paths = [path for path in folder.glob("block-*.safetensors") if int(path.name.split("-")[1]) < count]
    try:
        return Block.join(map(Block.read, paths), torch.arange(count)).images[:count] if paths else None
    except (UserError, ValueError):
        return None


class MemoryStore:
    """Blocks held in memory only: for scoring while training."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []

    def add(self, block: Block) -> None:
        self.blocks.append(block)

    def done(self) -> set[int]:
        """The images there are."""
        return {index for block in self.blocks for index in block.indices.tolist()}

    def block(self, count: int) -> Block:
        """Images 0 ... count - 1, which must be there."""
        return Block.join(self.blocks, torch.arange(count))


class DiskStore(MemoryStore):
    """Blocks kept in `folder`, each whole or not at all, and read one at a time when they are asked for.

    A damaged file is named, and its images are made again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._indices: dict[Path, Tensor] = {}
        for partial in folder.glob(".*.partial"):  # what a kill left; whoever reads this folder holds its lock
            partial.unlink(missing_ok=True)
        taken: set[int] = set()
        for path in sorted(folder.glob("block-*.safetensors")):
            try:
                indices = Block.read(path).indices.clone()  # a view would hold on to the whole file
                images = set(indices.tolist())
                if images & taken or len(images) != len(indices):
                    raise ValueError("it repeats images of another block")
            except (UserError, ValueError) as error:
                logger.warning(f"{path}: {error}; its images are made again")
                path.unlink(missing_ok=True)
                continue
            taken |= images
            self._indices[path] = indices

    def add(self, block: Block) -> None:
        first, last = int(block.indices[0]), int(block.indices[-1])
        path = self.folder / f"block-{first:09d}-{last:09d}-{len(block)}.safetensors"
        tensors = block.to_tensors()
        with as_user_error(path, sum(tensor.nbytes for tensor in tensors.values()), KEPT):
            save_tensors(path, tensors)
        self._indices[path] = block.indices

    def done(self) -> set[int]:
        return {index for indices in self._indices.values() for index in indices.tolist()}

    def block(self, count: int) -> Block:
        return Block.join(self._blocks(count), torch.arange(count))

    def first(self) -> list[Block]:
        """Those that hold nothing but images below FIRST_IMAGES: each was sampled as one batch."""
        return [block for block in self._blocks(FIRST_IMAGES) if int(block.indices[-1]) < FIRST_IMAGES]

    def _blocks(self, count: int) -> Iterator[Block]:
        """Those that hold some of the images 0 ... count - 1."""
        return (Block.read(path) for path, indices in self._indices.items() if int(indices[0]) < count)
