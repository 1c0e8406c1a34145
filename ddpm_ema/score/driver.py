"""The loop in which all processes do what rank 0's jobs ask for: load weights, generate images, gather their features."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from ddpm_ema import batch_order, compiling, messages
from ddpm_ema.distributed import Processes, StopFlag
from ddpm_ema.errors import StoppedError
from ddpm_ema.messages import logger
from ddpm_ema.named_weights import NamedWeights
from ddpm_ema.score import generate
from ddpm_ema.score.feature_store import FIRST_IMAGES
from ddpm_ema.score.generate import IMAGES, Made

T = TypeVar("T")
Jobs: TypeAlias = Generator["Job", None, T]
"""Yields jobs and returns what it made of their features. Every rank may hold one; its body runs on rank 0 alone."""
Shares: TypeAlias = "list[list[int]]"
"""The images of one round: of each rank, ascending indices."""


@dataclass(frozen=True)
class Job:
    """Images whose features rank 0 wants: it has all of them when it is asked for its next job.

    They are those of a `split` of the data, or `kept` by rank 0, or else sampled: with `weights`, or with those that are loaded
    where that is None.
    """

    title: str  # for the progress bar
    images: list[int]  # ascending indices, at least one
    extractors: tuple[str, ...]  # keys of those that are wanted
    take: Callable[[Made], None]  # called on rank 0 with what was made of each round's images
    weights: NamedWeights | None = None
    split: str = ""  # one of `Generator.datasets`
    kept: Callable[[Tensor], Tensor] | None = None  # indices, int64 [n] -> uint8 [n, C, H, W]
    at_once: bool = False  # sampled as one batch, whatever the batch size

    def __getstate__(self) -> dict[str, Any]:
        """What the other ranks hear of it: the files of weights, images and features are rank 0's."""
        weights = self.weights
        if weights is not None:
            weights = replace(weights, members=(_of_rank_0,) * len(weights.members))
        kept = _of_rank_0 if self.kept else None
        return {**vars(self), "take": _of_rank_0, "weights": weights, "kept": kept}


def _of_rank_0(*arguments: Any) -> Any:
    raise AssertionError("called on a rank that was told of a job")


class Driver:
    """One process's part in the work of all. Every method is called on every rank.

    A UserError on any rank is raised on all. Each round of images ends with one agreement, in which ranks also hear of a stop.
    """

    def __init__(self, processes: Processes, generator: generate.Generator, stop: StopFlag | None = None) -> None:
        self.processes, self.generator, self.stop = processes, generator, stop
        self._loaded, self._described, self._prepared = "", "", False

    def run(self, jobs: Jobs[T]) -> T | None:
        """Does rank 0's `jobs`, one after another; returns what they return, on rank 0, and None on the others."""
        returned: list[T] = []

        def all_jobs() -> Jobs[None]:
            returned.append((yield from jobs))

        with contextlib.closing(all_jobs()) as each:
            while (job := self.processes.on_main(lambda: next(each, None))) is not None:
                if job.weights is not None and job.weights.key != self._loaded:
                    self._load(job.weights)
                self.do(job)
                if self.stop is not None:
                    self.stop.nothing_to_save = bool(job.split)  # on which rank 0 may work for hours
        return returned[0] if returned else None

    def _load(self, weights: NamedWeights) -> None:
        """Rank 0 reads the weights, one member of an ensemble after another, and sends them to all."""
        members = []
        for member in weights.members:
            read: dict[str, Tensor] = {}
            self.processes.on_main(partial(lambda read, member: read.update(member()), read, member))
            members.append(self.processes.broadcast_tensors(read))
        self.generator.load(weights.name, weights.pipeline, members)
        self._loaded = weights.key
        if (text := self.generator.describe()) != self._described and self.processes.is_main:
            logger.info(text)
        self._described = text

    def do(self, job: Job) -> None:
        """Makes what a job asks for, with the weights that are loaded; rank 0 takes what was made of each round."""
        rounds, finished = self._shares(job), 0
        if self.stop is not None:
            self.stop.nothing_to_save = False
        with messages.bar(job.title, len(job.images), "images", hidden=not self.processes.is_main) as bar:
            for shares in rounds:
                made = self._round(job, shares, bar)
                finished += sum(map(len, shares))
                bar.update(finished - bar.n)
                self.processes.on_main(partial(job.take, made))

    def _shares(self, job: Job) -> Iterator[Shares]:
        world_size, generator = self.processes.world_size, self.generator
        if job.split or job.kept:
            return even_rounds(job.images, world_size, generator.config.evaluation.extractor_batch_size)
        if generator.config.evaluation.compile and not self._prepared:
            compiling.prepare("evaluation.compile", logger.info if self.processes.is_main else lambda line: None)
            self._prepared = True
        return sampling_rounds(job.images, world_size, len(job.images) if job.at_once else generator.batch_size)

    def _make(self, job: Job, images: list[int], kept: Tensor | None, after_step: Callable[[], None]) -> Made:
        """What is made of this rank's images, of which rank 0 may have sent those that it `kept`."""
        if kept is None and not job.split:
            with compiling.explained("evaluation.compile", self.stop):
                return self.generator.generate(images, job.extractors, after_step)
        pixels = self.generator.datasets[job.split].batch(torch.tensor(images)) if kept is None else kept
        return self.generator.read(job.title, images, pixels, job.extractors)

    def _round(self, job: Job, shares: Shares, bar: Any) -> Made:
        """What all ranks made of their images, on every rank."""
        images, own, kept = list(itertools.chain(*shares)), shares[self.processes.rank], None
        made: list[Made] = []
        if job.kept is not None:
            everything = self.processes.on_main(partial(job.kept, torch.tensor(images)), "reading images")
            kept = everything.split([len(share) for share in shares])[self.processes.rank]

        def after_step() -> None:
            self._check_stop(job.title)
            _advance(bar, len(images) / len(self.generator.sampler))

        with self.processes.sharing_errors():
            self._check_stop(job.title)
            made += [self._make(job, own, kept, after_step)] if own else []
        parts = list(itertools.chain(*self.processes.gather(made)))
        joined = {name: _joined([part[name] for part in parts], images) for name in parts[0]}
        for name, batch in joined.items():
            batch.sampling_seconds = joined[IMAGES].seconds if IMAGES in joined and name != IMAGES else 0.0
        return joined

    def _check_stop(self, title: str) -> None:
        if self.stop is not None and self.stop.requested:
            raise StoppedError(
                f"stopped by {self.stop.reason} while working on {title}; finished images are kept: start again to go on"
            )


def _joined(parts: list[Any], images: list[int]) -> Any:
    """One batch of all ranks', which worked side by side."""
    batch = type(parts[0]).join(parts, torch.tensor(images))
    batch.seconds = max(part.seconds for part in parts)
    return batch


def sampling_rounds(images: list[int], world_size: int, batch_size: int) -> Iterator[Shares]:
    """Rounds of sampled images: the first images by rank 0 alone, the others by all ranks."""
    first = [index for index in images if index < FIRST_IMAGES]
    for piece in _pieces(first, batch_size):
        yield [piece, *([] for _ in range(world_size - 1))]
    yield from even_rounds(images[len(first) :], world_size, batch_size)


def even_rounds(images: list[int], world_size: int, batch_size: int) -> Iterator[Shares]:
    """As few rounds as possible, of at most `batch_size` images per rank: rounds and shares at most one image apart."""
    for piece in _pieces(images, world_size * batch_size):
        cuts = (batch_order.partition(len(piece), rank, world_size) for rank in range(world_size))
        yield [piece[cut.start : cut.stop] for cut in cuts]


def _pieces(images: list[int], most: int) -> Iterator[list[int]]:
    for part in batch_order.micro_batches(range(len(images)), most) if images else []:
        yield images[part.start : part.stop]


def even_batch(num_images: int, world_size: int, most: int) -> int:
    """The batch size, at most `most`, at which `num_images` images per set of weights give the most even rounds."""
    rest = max(1, num_images - FIRST_IMAGES)
    num_rounds = -(-rest // (world_size * most))
    return max(-(-rest // (num_rounds * world_size)), min(FIRST_IMAGES, num_images, most))


def _advance(bar: Any, done: float) -> None:
    """Not past the end: parts of a round add up to it but for rounding, which tqdm warns of."""
    bar.update(min(done, bar.total - bar.n))
