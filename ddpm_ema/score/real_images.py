"""Real images beside samples: the data's floor, and the training images that samples lie near. All by one extractor.

The floor are real images beside the reference's, scored like samples: what a perfect generator would reach. Where either set was
trained on, the two also say what a sample's nearness to the training images means. Whoever sees the training image nearest to each
sample of a grid sees whether the samples are copies.
"""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ddpm_ema import metrics
from ddpm_ema.config import Config
from ddpm_ema.features import Extractor
from ddpm_ema.metrics import Reference
from ddpm_ema.metrics.nearest import nearer_to_training, nearest, nearest_of
from ddpm_ema.score.reference import floor_split, trained_on
from ddpm_ema.score.rows import RowBuilder

AT_ONCE = 2**24  # numbers of one batch of training images


class RealImages:
    """`reference`: what samples are compared with; `floor`: real images beside it; `trained`: the data set that was trained on.

    The latter two are None where there are none at hand.
    """

    def __init__(
        self,
        config: Config,
        extractor: Extractor,
        reference: Reference,
        floor: Reference | None = None,
        trained: Any = None,
    ) -> None:
        self.config, self.extractor, self.reference = config, extractor, reference
        self.floor, self.trained = floor, trained
        seen = {"reference": reference, "floor": floor}.get(trained_on(config) or "")
        self.seen: Tensor | None = seen.features if seen is not None else None
        """Features of the images that were trained on, float32 `[N, d]`."""

    def distance_of_floor(self, builder: RowBuilder) -> dict[str, Any]:
        """`floor` of results.json. Both sides are samples of their population, whatever the reading of the table is."""
        assert self.floor is not None
        features, split = self.floor.features, floor_split(self.config)
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
            "data": self.floor.origin["data"],
            "warnings": [f"real images ({split}): {warning}" for warning in found.warnings],
        }

    def nearer_to_training(self, features: Tensor) -> dict[str, float]:
        """For a row; empty where neither side was trained on, or the images of one are not at hand."""
        if self.seen is None or self._unseen is None:
            return {}
        near = nearest(features.to(self.extractor.device), self.seen)
        return {"nearer_to_training": nearer_to_training(near, self._unseen)}

    @cached_property
    def _unseen(self) -> Tensor | None:
        """Of each image that was not trained on, the distance to the nearest that was."""
        other = self.floor if self.seen is self.reference.features else self.reference
        if self.seen is None or other is None or other.features is None:
            return None
        return nearest(other.features.to(self.extractor.device), self.seen)

    @property
    def title(self) -> str:
        """What pictures of `nearest_trained` show."""
        between = "pixels" if self.seen is None else f"features of {self.extractor.label}"
        return f"Nearest training image of each sample, by Euclidean distance between {between}"

    def nearest_trained(self, images: Tensor, features: Tensor) -> Tensor:
        """The training image nearest to each of a few samples, uint8 `[n, C, H, W]` with features `[n, d]`.

        Without features of the training images, pixels are compared: that takes no network, and reads every one once.
        """
        points = images.flatten(1) if self.seen is None else features
        rows = torch.arange(len(self.trained)).split(max(1, AT_ONCE // points.shape[1]))
        batches = (self.trained.batch(row).flatten(1) if self.seen is None else self.seen[row] for row in rows)
        _, places = nearest_of(points.to(self.extractor.device), batches)
        return self.trained.batch(places).cpu()  # type: ignore[no-any-return]
