"""One checkpoint scored: every set of weights sampled from the same noise, compared with the reference, and with raw."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ddpm_ema.averaging import profile_from_dict
from ddpm_ema.config import Config, digest
from ddpm_ema.distributed import Processes
from ddpm_ema.errors import UserError
from ddpm_ema.messages import logger
from ddpm_ema.metrics import Estimate, Reference
from ddpm_ema.named_weights import NamedWeights, WeightResolver
from ddpm_ema.rundir import Checkpoint, RunDir
from ddpm_ema.sampling import PROTOCOL
from ddpm_ema.score.blocks import MemoryStore
from ddpm_ema.score.folder import Record, ScoreFolder, made_with
from ddpm_ema.score.measure import Measure, Score
from ddpm_ema.score.results import results_of, settings_of
from ddpm_ema.score.studio import Studio
from ddpm_ema.score.together import on_main, only_on_main
from ddpm_ema.weight_names import parse, profile_named


@dataclass(frozen=True)
class Label:
    """What every rank knows of a source, which only rank 0 can open."""

    name: str
    key: str


class Scoring:
    """Scores weights of one checkpoint, one set after another. Made on every rank; files, metrics and rows are rank 0's."""

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
        self.settings = settings_of(config, studio.extractor, origin, studio.known_labels)
        self.notes: list[str] = list(origin.get("notes", ()))
        rundir = RunDir(config.output_dir)
        self.folder = ScoreFolder(rundir.score_dir(self.step, digest(self.settings)))
        self.resolver = WeightResolver(rundir, checkpoint, config, studio.num_classes, studio.own_pipeline)
        self.measure = Measure(reference, config.evaluation, processes.device) if reference is not None else None
        self.versions = made_with(processes.device)
        self.loaded: str | None = None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Rank 0 holds the folder; its refusal is everyone's."""
        with contextlib.ExitStack() as stack:
            on_main(self.processes, lambda: self._take(stack))
            yield

    def _take(self, stack: contextlib.ExitStack) -> None:
        stack.enter_context(RunDir(self.folder.path).lock())

    def label(self, source: NamedWeights | None) -> Label:
        """Of rank 0's source, on every rank. A collective."""
        label = self.processes.broadcast(Label(source.name, source.key) if source else None)
        assert label is not None
        return label

    def open(self, name: str) -> NamedWeights | None:
        """On rank 0: the source; elsewhere None. A collective; a name that means nothing is an error on every rank."""
        return only_on_main(self.processes, lambda: self.resolver.named(name))

    def score_source(self, source: NamedWeights | None, count: int | None = None, named: bool = True) -> None:
        """Samples what is missing of these weights and keeps their score. A collective.

        `named`: it was asked for by its name, and belongs into the table.
        """
        label, count = self.label(source), count or self.config.evaluation.num_images
        record = self.folder.record(label.key) if self.processes.is_main else None
        if not self.processes.broadcast(record is not None and count in record.rows):
            self.sample(source, label, count)
        on_main(self.processes, lambda: self._keep_score(source, count, named))

    def sample(self, source: NamedWeights | None, label: Label, count: int) -> None:
        """Extends the blocks of these weights to the images 0 ... count - 1. A collective."""
        store = self.folder.store(label.key) if self.processes.is_main else MemoryStore()
        if self.processes.broadcast(self.processes.is_main and store.done().issuperset(range(count))):
            return
        on_main(self.processes, lambda: self.folder.keep(self.record(source)))
        self.load(source, label)
        self.studio.extend(label.name, store, count)

    def load(self, source: NamedWeights | None, label: Label) -> None:
        """These weights into every rank's network; rank 0 reads them. A collective."""
        if self.loaded != label.key:
            self.studio.load(source)
            self.loaded = label.key

    def record(self, source: NamedWeights | None) -> Record:
        """Rank 0: what is known of these weights, or a new record."""
        assert source is not None
        return self.folder.record(source.key) or Record(source.key, source.name, source.profile)

    def _keep_score(self, source: NamedWeights | None, count: int, named: bool) -> None:
        assert source is not None
        assert self.measure is not None
        record = self.record(source)
        if count not in record.rows:
            described = {
                "weights_sha256": source.key,
                "profile": source.profile,
                "protocol": PROTOCOL,
                "versions": self.versions,
                "warnings": list(source.warnings),
            }
            if source.reconstruction is not None:
                described["reconstruction"] = source.reconstruction
            score = self.measure.score(self.folder.store(source.key).block(count), source.name, described)
            record.rows[count], record.estimates[count] = score.row, score.estimate
        if named and source.name not in record.names:
            record.names.append(source.name)
        self.folder.keep(record)

    def estimate(self, key: str, count: int) -> Estimate | None:
        """Rank 0: the distance over the first `count` images of some weights; None where they were not sampled or are gone."""
        record = self.folder.record(key)
        if record is None or self.measure is None:
            return None
        if count not in record.estimates:
            store = self.folder.store(key)
            if not store.done().issuperset(range(count)):
                return None
            record.estimates[count] = self.measure.estimate(store.block(count), record.name)
            self.folder.keep(record)
        return record.estimates[count]

    def source_of(self, record: Record) -> NamedWeights | None:
        """Rank 0: the weights that a record tells of; None where they were written anew or are gone."""
        for name in (*record.names, record.name):
            if (source := self._named(record, name)) is not None:
                return source
        with contextlib.suppress(UserError, ValueError):
            source = self.resolver.reconstructed(profile_from_dict(record.profile or {}))
            return source if source.key == record.key else None
        return None

    def _named(self, record: Record, name: str) -> NamedWeights | None:
        """The weights that are called `name` now, where they are still those of the record."""
        with contextlib.suppress(UserError):
            source = self.resolver.named(name)
            return source if source.key == record.key else None
        return None

    def scores(self) -> list[Score]:
        """Rank 0: of all weights that were asked for by name, now or earlier, and still are what they were."""
        found = [(record, record.score(self.config.evaluation.num_images)) for record in self.folder.records()]
        return [
            replace(score, row={**score.row, "weights": name})
            for record, score in found
            if score is not None
            for name in record.names
            if self._named(record, name) is not None
        ]

    def write(self, sweep: Mapping[str, Any], note: str | None = None) -> dict[str, Any]:
        """Rank 0: results.json and grid.png of what is finished; returns the results."""
        assert self.measure is not None
        results = results_of(
            self.config, self.studio.extractor, self.settings, self.step, self.scores(), self.measure.reference
        )
        results |= {"versions": self.versions, "world_size": self.processes.world_size, **sweep}
        results["warnings"] = [*([note] if note else []), *self.notes, *results["warnings"]]
        keys = {row["weights"]: row["weights_sha256"] for row in results["rows"]}
        known = {name for record in self.folder.records() if record.rows for name in record.names}
        if left := sorted(known - keys.keys()):
            logger.info(f"left out: {', '.join(left)}: the weights that an earlier scoring saw are no longer there")
        self.folder.write(results, keys, self.step, self.config.evaluation)
        return results


def checkpoints(config: Config, processes: Processes) -> list[Checkpoint | None]:
    """The checkpoints to score, on rank 0 (elsewhere as many Nones). A collective.

    A single None on rank 0, too, where there is no checkpoint and no name needs one.
    """
    found = only_on_main(processes, lambda: _find_checkpoints(config))
    count = processes.broadcast(len(found) if found else 0)
    return found if found is not None else [None] * count


def _find_checkpoints(config: Config) -> list[Checkpoint | None]:
    rundir, evaluation = RunDir(config.output_dir), config.evaluation
    everything = rundir.checkpoints()
    if not everything and _needs_no_checkpoint(config):
        return [None]
    if not everything:
        raise UserError(f"{rundir.path}: no checkpoint to score; train first with scripts/train.py")
    if evaluation.steps == "all":
        return list(everything)
    if evaluation.steps == "last":
        newest, passed_over = rundir.newest_whole()
        for reason in passed_over:
            logger.warning(f"passed over a checkpoint that is not whole: {reason}")
        if newest is None:
            raise UserError(f"{rundir.path}: no checkpoint is whole:\n  " + "\n  ".join(passed_over))
        return [newest]
    return [rundir.checkpoint(step) for step in evaluation.steps]


def _needs_no_checkpoint(config: Config) -> bool:
    """Whether every name is a diffusers folder, or reconstructed from snapshots."""
    parts = [part for name in config.evaluation.weights for part in parse(name, config.averages)]
    return bool(parts) and all(part.folder or profile_named(part.name) is not None for part in parts)
