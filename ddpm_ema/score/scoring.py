"""One checkpoint scored: every copy sampled from the same noise, compared with the reference, and with raw."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ddpm_ema.config import Config, digest
from ddpm_ema.errors import UserError
from ddpm_ema.metrics import Reference
from ddpm_ema.processes import Processes, say
from ddpm_ema.rundir import Checkpoint, RunDir
from ddpm_ema.score.blocks import DiskStore, MemoryStore
from ddpm_ema.score.measure import Measure, Score
from ddpm_ema.score.results import ScoreFolder, results_of, settings_of
from ddpm_ema.score.studio import Studio
from ddpm_ema.score.together import on_main, only_on_main
from ddpm_ema.score.weights import Shelf, Source


@dataclass(frozen=True)
class Label:
    """What every rank knows of a source, which only rank 0 can open."""

    name: str
    slug: str
    num_members: int


class Scoring:
    """Scores copies of one checkpoint, one after another. Made on every rank; files, metrics and rows are rank 0's."""

    def __init__(
        self,
        config: Config,
        processes: Processes,
        studio: Studio,
        reference: Reference | None,
        origin: Mapping[str, Any],
        checkpoint: Checkpoint | None,
    ) -> None:
        self.config, self.processes, self.studio = config, processes, studio
        self.step = processes.broadcast(checkpoint.step if checkpoint else 0)
        self.settings = settings_of(config, studio.extractor, origin)
        self.notes: list[str] = list(origin.get("notes", ()))
        rundir = RunDir(config.output_dir)
        self.folder = ScoreFolder(rundir.score_dir(self.step, digest(self.settings)))
        self.shelf = Shelf(rundir, checkpoint, dict(studio.network.unet.config))
        self.measure = Measure(reference, config.evaluation, processes.device) if reference is not None else None
        self.loaded: str | None = None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Rank 0 holds the folder; its refusal is everyone's."""
        with contextlib.ExitStack() as stack:
            on_main(self.processes, lambda: self._take(stack))
            yield

    def _take(self, stack: contextlib.ExitStack) -> None:
        stack.enter_context(RunDir(self.folder.path).lock())

    def label(self, source: Source | None) -> Label:
        """Of rank 0's source, on every rank. A collective."""
        label = self.processes.broadcast(Label(source.name, source.slug, len(source.members)) if source else None)
        assert label is not None
        return label

    def score(self, name: str) -> None:
        """Scores the weights called `name`, unless that is done. A collective."""
        self.score_source(self.open(name))

    def open(self, name: str) -> Source | None:
        """On rank 0: the source; elsewhere None. A collective; a name that means nothing is an error on every rank."""
        return only_on_main(self.processes, lambda: self.shelf.source(name))

    def score_source(
        self,
        source: Source | None,
        num_images: int | None = None,
        more: Mapping[str, Any] | None = None,
        keep_features: bool = False,
    ) -> None:
        """Samples what is missing of a copy and keeps its score. A collective."""
        label = self.label(source)
        count = num_images or self.config.evaluation.num_images
        if self.processes.broadcast(self.folder.finished(label.slug) is not None):
            return
        self.sample(source, label, count)
        on_main(self.processes, lambda: self._finish(source, label, count, more or {}, keep_features))

    def sample(self, source: Source | None, label: Label, count: int) -> None:
        """Extends the copy's blocks to the images 0 ... count - 1. A collective."""
        store = self.store(label.slug) if self.processes.is_main else MemoryStore()
        if self.processes.broadcast(store.done().issuperset(range(count))):
            return
        if self.loaded != label.slug:
            self.studio.network.load(self._tensors(source, label), label.name)
            self.loaded = label.slug
        self.studio.extend(label.name, store, count)

    def store(self, slug: str) -> DiskStore:
        """Rank 0: what there is of a copy. Read from disk each time: one copy's features at most are held."""
        return DiskStore(self.folder.copy_folder(slug))

    def _tensors(self, source: Source | None, label: Label) -> list[dict[str, Tensor]]:
        """The weights of every member, on every rank; rank 0 reads them. A collective."""
        members = []
        for place in range(label.num_members):
            read = only_on_main(self.processes, partial(_read_member, source, place))
            members.append(self.processes.broadcast_tensors(read))
        return members

    def _finish(
        self, source: Source | None, label: Label, count: int, more: Mapping[str, Any], keep_features: bool
    ) -> None:
        assert source is not None
        assert self.measure is not None
        store = self.store(label.slug)
        block = store.block().first(count)
        described = {"profile": source.profile, **more, "warnings": list(source.warnings)}
        if source.reconstruction is not None:
            described["reconstruction"] = source.reconstruction
        score = self.measure.score(block, label.name, described)
        self.folder.finish(label.slug, score, block.images)
        if label.name != "raw" and not keep_features:
            DiskStore.clear_folder(
                store.folder
            )  # raw's stay: later copies and sweeps are paired with any number of its images

    def raw_score(self, count: int) -> Score | None:
        """Rank 0: raw over its first `count` images, or None where raw was not scored or its features are gone."""
        assert self.measure is not None
        slug = self.shelf.source("raw").slug if self.shelf.checkpoint else None
        finished = self.folder.finished(slug) if slug else None
        if slug is None or finished is None or sum(finished.estimate.counts) == count:
            return finished
        store = self.store(slug)
        if not store.done().issuperset(range(count)):
            return None
        return Score(finished.row, self.measure.estimate(store.block().first(count), "raw"))

    def write(self, sources: Sequence[Source], sweep: Mapping[str, Any]) -> dict[str, Any]:
        """Rank 0: results.json and grid.png of what is finished; returns the results."""
        done = [(s.slug, score) for s in sources if (score := self.folder.finished(s.slug)) is not None]
        done += [
            (slug, score)
            for slug, score in self.folder.others([slug for slug, _ in done], [s.row["weights"] for _, s in done])
            if not score.row.get("sweep")
        ]
        scores = [score for _, score in done]
        world, notes = self.processes.world_size, self.notes
        results = results_of(self.config, self.studio.extractor, self.settings, self.step, scores, world, notes)
        # A scoring without a sweep keeps what an earlier one found.
        results |= sweep or {key: value for key, value in self.folder.results().items() if key.startswith("sweep")}
        slugs = {str(score.row["weights"]): slug for slug, score in done}
        shown = {row["weights"]: slugs[row["weights"]] for row in results["rows"]}
        self.folder.write_grid(shown, self.step, self.config.evaluation)
        self.folder.write_results(results)
        self._tidy()
        return results

    def _tidy(self) -> None:
        """Features that a search kept are no longer asked for."""
        for path in self.folder.path.glob("copies/*/score.json"):
            if not path.parent.name.startswith("raw-"):
                DiskStore.clear_folder(path.parent)


def _read_member(source: Source | None, place: int) -> dict[str, Tensor]:
    assert source is not None
    return source.members[place]()


def checkpoints(config: Config, processes: Processes) -> list[Checkpoint | None]:
    """The checkpoints to score, on rank 0 (elsewhere as many Nones). A collective.

    A single None on rank 0, too, where there is no checkpoint and every name is a diffusers folder.
    """
    found = only_on_main(processes, lambda: _find_checkpoints(config))
    count = processes.broadcast(len(found) if found else 0)
    return found if found is not None else [None] * count


def _find_checkpoints(config: Config) -> list[Checkpoint | None]:
    rundir, evaluation = RunDir(config.output_dir), config.evaluation
    everything = rundir.checkpoints()
    if not everything and _folders_only(config):
        return [None]
    if not everything:
        raise UserError(f"{rundir.path}: no checkpoint to score; train first with scripts/train.py")
    if evaluation.steps == "all":
        return list(everything)
    if evaluation.steps == "last":
        newest, passed_over = rundir.newest_whole()
        for reason in passed_over:
            say(f"warning: passed over a checkpoint that is not whole: {reason}")
        if newest is None:
            raise UserError(f"{rundir.path}: no checkpoint is whole:\n  " + "\n  ".join(passed_over))
        return [newest]
    return [rundir.checkpoint(step) for step in evaluation.steps]


def _folders_only(config: Config) -> bool:
    """Whether every name is a diffusers folder, so that no checkpoint is needed."""
    parts = [part for name in config.evaluation.weights for part in name.split("+")]
    return bool(parts) and all(Path(part).is_dir() and part not in ("raw", *config.averages) for part in parts)
