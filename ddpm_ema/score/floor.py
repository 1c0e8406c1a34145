"""The data's floor: real images beside the reference's, scored like samples. What a perfect generator would reach.

Where either set of images was trained on, it also says what a sample's nearness to the training images means.
"""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ddpm_ema import metrics
from ddpm_ema.config import Config
from ddpm_ema.metrics import Reference
from ddpm_ema.metrics.nearest import nearer_to_training, nearest
from ddpm_ema.score.reference import floor_split, trained_on
from ddpm_ema.score.rows import RowBuilder


class Floor:
    """`images`: features of the floor's images, by the extractor of the `reference`. The work is done on `device`."""

    def __init__(self, config: Config, images: Reference, reference: Reference, device: torch.device) -> None:
        self.config, self.images, self.reference, self.device = config, images, reference, device

    def estimate(self, builder: RowBuilder) -> dict[str, Any]:
        """`floor` of results.json. Both sides are samples of their population, whatever the reading of the table is."""
        features, split = self.images.features, floor_split(self.config)
        assert features is not None
        found = metrics.estimate_distance(
            features,
            torch.arange(len(features)),
            self.config.evaluation.groups,
            builder.frechet,
            sampled_from=self.reference.features,
            name=f"the {split} images",
        )
        return {
            "distance": found.unbiased,
            "stderr": found.stderr,
            "interval95": list(found.interval()),
            "num_images": len(features),
            "split": split,
            "data": self.images.origin["data"],
        }

    def nearer_to_training(self, features: Tensor) -> dict[str, float]:
        """For a row; empty where neither side was trained on, or the reference's images are not at hand."""
        if self._seen is None or self._unseen is None:
            return {}
        return {"nearer_to_training": nearer_to_training(nearest(features.to(self.device), self._seen), self._unseen)}

    @property
    def _seen(self) -> Tensor | None:
        """Features of the images that were trained on."""
        sides = {"reference": self.reference.features, "floor": self.images.features}
        return sides.get(trained_on(self.config) or "")

    @cached_property
    def _unseen(self) -> Tensor | None:
        """Of each image that was not trained on, the distance to the nearest that was."""
        seen = self._seen
        other = self.images.features if seen is self.reference.features else self.reference.features
        return None if seen is None or other is None else nearest(other.to(self.device), seen)
