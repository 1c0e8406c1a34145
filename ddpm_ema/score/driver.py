"""The loop in which all processes do what rank 0's jobs ask for: load weights, generate images, gather their features."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Generator, Iterable, Iterator
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
from ddpm_ema.score.feature_store import FIRST_IMAGES, FeatureBatch

T = TypeVar("T")
Jobs: TypeAlias = Generator["Job", None, T]
"""Yields jobs and returns what it made of their features. Every rank may hold one; its body runs on rank 0 alone."""
Shares: TypeAlias = "list[list[int]]"
"""The images of one round: of each rank, ascending indices."""


@dataclass(frozen=True)
class Job:
    """Images whose features rank 0 wants: it has all of them when it is asked for its next job.

    Attributes:
        title: for the progress bar.
        images: ascending indices, at least one.
        take: called on rank 0 with the features of each round.
        weights: that the images are sampled with; None: they are images of the reference.
        at_once: sampled as one batch, whatever the batch size.
    """

    title: str
    images: list[int]
    take: Callable[[FeatureBatch], None]
    weights: NamedWeights | None = None
    at_once: bool = False

    def told(self) -> Job:
        """What the other ranks hear of it: the files of the weights and the features are rank 0's."""
        weights = self.weights
        if weights is not None:
            weights = replace(weights, members=(_of_rank_0,) * len(weights.members))
        return replace(self, take=_of_rank_0, weights=weights)


def _of_rank_0(*arguments: Any) -> Any:
    raise AssertionError("called on a rank that was told of a job")


class Driver:
    """One process's part in the work of all. Every method is called on every rank.

    A UserError on any rank is raised on all. Each round of images ends with one agreement, in which ranks also hear of a stop.
    """

    def __init__(self, processes: Processes, generator: generate.Generator, stop: StopFlag | None = None) -> None:
        self.processes, self.generator, self.stop = processes, generator, stop
        self._loaded, self._described, self._prepared = "", "", False

    def run(self, jobs: Jobs[Any]) -> None:
        """Does rank 0's `jobs`, one after another."""
        own: list[Job] = []  # on rank 0: the present one

        def advance() -> Job | None:
            own[:] = itertools.islice(jobs, 1)
            return own[0].told() if own else None

        def take(batch: FeatureBatch) -> None:
            own[0].take(batch)

        with contextlib.closing(jobs):
            while (job := self.processes.on_main(advance)) is not None:
                if job.weights is None:
                    most = self.generator.config.evaluation.extractor_batch_size
                    rounds = even_rounds(job.images, self.processes.world_size, most)
                    self._rounds(job.title, rounds, self.generator.read, take)
                else:
                    if job.weights.key != self._loaded:
                        self._load(job.weights, own)
                    self.generate(job.title, job.images, take, len(job.images) if job.at_once else None)

    def _load(self, weights: NamedWeights, own: list[Job]) -> None:
        """Rank 0 reads the weights, one member of an ensemble after another, and sends them to all."""
        members = []
        for place in range(len(weights.members)):
            read: dict[str, Tensor] = {}
            self.processes.on_main(partial(_read, own, place, read))
            members.append(self.processes.broadcast_tensors(read))
        self.generator.load(weights.name, weights.pipeline, members)
        self._loaded = weights.key
        if (text := self.generator.describe()) != self._described and self.processes.is_main:
            logger.info(text)
        self._described = text

    def generate(
        self, title: str, images: list[int], take: Callable[[FeatureBatch], None], batch_size: int | None = None
    ) -> None:
        """Generates images with the weights that are loaded; rank 0 takes the features of each round."""
        rounds = sampling_rounds(images, self.processes.world_size, batch_size or self.generator.batch_size)
        self._rounds(title, rounds, self._generate, take)

    def _generate(self, images: list[int], after_step: Callable[[], None]) -> FeatureBatch:
        if self.generator.config.evaluation.compile and not self._prepared:
            compiling.prepare("evaluation.compile", logger.info if self.processes.is_main else lambda line: None)
            self._prepared = True
        with compiling.explained("evaluation.compile", self.stop):
            return self.generator.generate(images, after_step)

    def _rounds(
        self, title: str, rounds: Iterable[Shares], make: Callable[..., FeatureBatch], take: Callable[..., None]
    ) -> None:
        rounds = list(rounds)
        total, finished = sum(len(share) for shares in rounds for share in shares), 0
        with messages.bar(title, total, "images", hidden=not self.processes.is_main) as bar:
            for shares in rounds:
                batch = self._round(title, shares, make, bar)
                finished += len(batch)
                bar.update(finished - bar.n)
                self.processes.on_main(partial(take, batch))

    def _round(self, title: str, shares: Shares, make: Callable[..., FeatureBatch], bar: Any) -> FeatureBatch:
        """The features of all ranks' images, on every rank."""
        start, mine = time.perf_counter(), shares[self.processes.rank]
        images = list(itertools.chain(*shares))
        made: list[FeatureBatch] = []

        def after_step() -> None:
            self._check_stop(title)
            _advance(bar, len(images) / len(self.generator.sampler))

        with self.processes.sharing_errors():
            self._check_stop(title)
            made += [make(mine, after_step)] if mine else []
        parts = itertools.chain(*self.processes.gather(made))
        batch = FeatureBatch.join(parts, torch.tensor(images))
        batch.seconds = time.perf_counter() - start
        return batch

    def _check_stop(self, title: str) -> None:
        if self.stop is not None and self.stop.requested:
            raise StoppedError(
                f"stopped by {self.stop.reason} while working on {title}; finished images are kept: start again to go on"
            )


def _read(own: list[Job], place: int, into: dict[str, Tensor]) -> None:
    assert own[0].weights is not None
    into.update(own[0].weights.members[place]())


def sampling_rounds(images: list[int], world_size: int, batch_size: int) -> Iterator[Shares]:
    """Rounds of sampled images: the first images by rank 0 alone, the others by all ranks."""
    first = [index for index in images if index < FIRST_IMAGES]
    for piece in _pieces(first, batch_size):
        yield alone(piece, world_size)
    yield from even_rounds(images[len(first) :], world_size, batch_size)


def even_rounds(images: list[int], world_size: int, batch_size: int) -> Iterator[Shares]:
    """As few rounds as possible, of at most `batch_size` images per rank: rounds and shares at most one image apart."""
    for piece in _pieces(images, world_size * batch_size):
        cuts = (batch_order.partition(len(piece), rank, world_size) for rank in range(world_size))
        yield [piece[cut.start : cut.stop] for cut in cuts]


def alone(images: list[int], world_size: int) -> Shares:
    """A round of rank 0."""
    return [images, *([] for _ in range(world_size - 1))]


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
