"""Scores the weights of one checkpoint, on one process: says which images are missing, takes their features, keeps rows."""

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ddpm_ema.averaging import profile_from_dict
from ddpm_ema.errors import UserError
from ddpm_ema.messages import logger
from ddpm_ema.metrics import Estimate
from ddpm_ema.named_weights import NamedWeights, WeightResolver
from ddpm_ema.sampling import PROTOCOL
from ddpm_ema.score.driver import Jobs
from ddpm_ema.score.feature_store import BatchStore, FeatureBatch
from ddpm_ema.score.folder import Record, ScoreFolder
from ddpm_ema.score.generate import Generator
from ddpm_ema.score.real_images import RealImages
from ddpm_ema.score.reference import reading_of
from ddpm_ema.score.results import results_of
from ddpm_ema.score.rows import RowBuilder, Score, ranked
from ddpm_ema.score.sampled import Sampled, made_with


class Scorer:
    """Scores weights of one checkpoint by one extractor, one set after another. Its caller holds the lock of `sampled`.

    It knows nothing of other processes: what yields `Job`s is told their features by whoever runs it, before it goes on. The
    `generator` is asked about settings, network and sampler alone; `real` are the images that samples are compared with; `folder`
    keeps the table, `settings` are those of `settings_of`.
    """

    def __init__(
        self,
        generator: Generator,
        real: RealImages,
        resolver: WeightResolver,
        sampled: Sampled,
        folder: ScoreFolder,
        settings: Mapping[str, Any],
        world_size: int = 1,
    ) -> None:
        self.config, self.generator, self.real, self.resolver = generator.config, generator, real, resolver
        self.sampled, self.folder, self.settings, self.world_size = sampled, folder, settings, world_size
        self.step, device = resolver.checkpoint.step if resolver.checkpoint else 0, real.extractor.device
        population = reading_of(self.config) == "population"
        self.builder = RowBuilder(real.reference, self.config.evaluation, device, population)
        self.versions = made_with(device)

    def named(self) -> list[NamedWeights]:
        """What `evaluation.weights` names, each once, however often it is spelled.

        Raises:
            UserError: a name means nothing, or its weights cannot be sampled as the settings say.
        """
        found = [self.resolver.named(text) for text in self.config.evaluation.weights or ("raw", *self.config.averages)]
        for weights in found:
            self.generator.sampler_for(weights.pipeline)
        return list({weights.name: weights for weights in found}.values())

    def is_complete(self, wanted: Iterable[NamedWeights]) -> bool:
        """Whether all of these weights have their row."""
        return {weights.name for weights in wanted} <= {score.row["weights"] for score in self.scores()}

    def score(self, weights: NamedWeights, count: int | None = None, named: bool = True) -> Jobs[None]:
        """Makes the row of these weights over images 0 ... `count` − 1 (None: the settings' number).

        `named`: they were asked for by their name, and belong into the table.
        """
        count = count or self.config.evaluation.num_images
        if count not in self.record(weights).rows:
            yield from self.sample(weights, count)
        record = self.record(weights)
        if count not in record.rows:
            batch = self.features(weights.key).join(count)
            more = self._described(weights) | self.real.nearer_to_training(batch.features)
            score = self.builder.build(batch, weights.name, more)
            record.rows[count], record.estimates[count] = score.row, score.estimate
        if named and weights.name not in record.names:
            record.names.append(weights.name)
        self.folder.keep(record)

    def sample(self, weights: NamedWeights, count: int) -> Jobs[None]:
        """Asks for what is missing of the images 0 ... `count` − 1, by every extractor at once."""
        if self.features(weights.key).missing(count):
            self.folder.keep(self.record(weights))
            yield from self.sampled.sample(weights, count)

    def features(self, key: str) -> BatchStore[FeatureBatch]:
        """Of the images of the weights with this key."""
        return self.sampled.features(key, self.real.extractor.key)

    def record(self, weights: NamedWeights) -> Record:
        """What is known of these weights, or a new record."""
        return self.folder.record(weights.key) or Record(weights.key, weights.name, weights.profile)

    def _described(self, weights: NamedWeights) -> dict[str, Any]:
        """What a row says of its weights beside the figures."""
        described = {
            "weights_sha256": weights.key,
            "profile": weights.profile,
            "protocol": PROTOCOL,
            "versions": self.versions,
            "warnings": list(weights.warnings),
        }
        return described | ({"reconstruction": weights.reconstruction} if weights.reconstruction is not None else {})

    def estimate(self, key: str, count: int) -> Estimate | None:
        """The distance over the first `count` images of some weights; None where they were not sampled or are gone."""
        record = self.folder.record(key)
        if record is None:
            return None
        if count not in record.estimates:
            store = self.features(key)
            if store.missing(count):
                return None
            record.estimates[count] = self.builder.estimate(store.join(count), record.name)
            self.folder.keep(record)
        return record.estimates[count]

    def weights_of(self, record: Record) -> NamedWeights | None:
        """The weights that a record tells of; None where they were written anew or are gone."""
        for name in (*record.names, record.name):
            if (weights := self._still_named(record, name)) is not None:
                return weights
        with contextlib.suppress(UserError, ValueError):
            weights = self.resolver.reconstructed(profile_from_dict(record.profile or {}))
            return weights if weights.key == record.key else None
        return None

    def _still_named(self, record: Record, name: str) -> NamedWeights | None:
        """The weights that are called `name` now, where they are still those of the record."""
        with contextlib.suppress(UserError):
            weights = self.resolver.named(name)
            return weights if weights.key == record.key else None
        return None

    def scores(self) -> list[Score]:
        """Of all weights that were asked for by name, now or earlier, and still are what they were, each with its estimate."""
        found = [(record, record.score(self.config.evaluation.num_images)) for record in self.folder.records()]
        return [
            replace(score, row={**score.row, "weights": name, "estimate": score.estimate.to_dict()})
            for record, score in found
            if score is not None
            for name in record.names
            if self._still_named(record, name) is not None
        ]

    def _floor(self) -> dict[str, Any]:
        """`floor` of results.json, which is computed once; empty where there are no such images."""
        known = self.folder.results().get("floor")
        if self.real.floor is None or (known and known["data"] == self.real.floor.origin["data"]):
            return {"floor": known} if known else {}
        return {"floor": self.real.distance_of_floor(self.builder)}

    def write(self, sweep: Mapping[str, Any], note: str | None = None) -> dict[str, Any]:
        """Writes results.json and grid.png of what is finished; returns the results."""
        results = results_of(self.real, self.settings, self.step, self.scores())
        results |= {"versions": self.versions, "world_size": self.world_size, **self._floor(), **sweep}
        results["warnings"] += results.get("floor", {}).get("warnings", ())
        if note is not None:
            results["warnings"].insert(0, note)
        known = {name for record in self.folder.records() if record.rows for name in record.names}
        if left := sorted(known - {row["weights"] for row in results["rows"]}):
            logger.info(f"left out: {', '.join(left)}: the weights that an earlier scoring saw are no longer there")
        shown = self._shown(results)
        self.folder.write(results, {name: some for name, (_, some) in shown.items()}, self.step, self.config.evaluation)
        self._keep_nearest(shown)
        return results

    def _shown(self, results: Mapping[str, Any]) -> dict[str, tuple[str, Tensor]]:
        """The rows of the grid, as far as their images are there: name -> key and images.

        Those of all weights that have a name, and of the first candidate of a sweep that may be the best.
        """
        rows = {row["weights"]: row for row in results["rows"]}
        swept = {row["weights"]: row for row in results.get("sweep", ())}
        best = [swept[name] for name in results["may_be_best"] if name in swept.keys() - rows.keys()]
        found = {}
        for row in ranked([*best[:1], *rows.values()]):
            images = self.sampled.first_images(row["weights_sha256"], self.config.evaluation.grid_images)
            if images is not None:
                found[row["weights"]] = row["weights_sha256"], images
        return found

    def _keep_nearest(self, shown: Mapping[str, tuple[str, Tensor]]) -> None:
        """The training image nearest to each that the grid shows (name -> key and images), where it is not kept yet."""
        if self.real.trained is None:
            return

        def is_wanted(key: str, count: int) -> bool:
            stores = self.features(key), self.sampled.images(key)  # of either, a user may have deleted some
            return not self.folder.nearest_path(key, count).exists() and not any(s.missing(count) for s in stores)

        wanted = {name: (key, some) for name, (key, some) in shown.items() if is_wanted(key, len(some))}
        if not wanted:
            return
        features = [self.features(key).join(len(some)).features for key, some in wanted.values()]
        images = torch.cat([some for _, some in wanted.values()])
        found = self.real.nearest_trained(images, torch.cat(features))  # one pass for all weights
        for (name, (key, _)), near in zip(wanted.items(), found.split([len(one) for one in features]), strict=True):
            self.folder.keep_nearest(key, name, near, self.real.title)
