"""The training image nearest to each sample that a grid shows: whoever sees both sees whether the samples are copies."""

from typing import Any

import torch
from torch import Tensor

from ddpm_ema.features import Extractor
from ddpm_ema.metrics.nearest import nearest_of

AT_ONCE = 2**24  # numbers of one batch of training images


class TrainingImages:
    """`dataset`: all images that were trained on; `features`: theirs by the extractor, float32 `[N, d]`.

    Without features, pixels are compared: that takes no network, and reads every training image once.
    """

    def __init__(self, dataset: Any, extractor: Extractor, features: Tensor | None) -> None:
        self.dataset, self.extractor, self.features = dataset, extractor, features

    @property
    def title(self) -> str:
        """What pictures of them show."""
        between = "pixels" if self.features is None else f"features of {self.extractor.label}"
        return f"Nearest training image of each sample, by Euclidean distance between {between}"

    def nearest(self, images: Tensor, features: Tensor) -> Tensor:
        """The nearest to each of a few samples, uint8 `[n, C, H, W]` with features `[n, d]`."""
        points = images.flatten(1) if self.features is None else features
        rows = torch.arange(len(self.dataset)).split(max(1, AT_ONCE // points.shape[1]))
        batches = (self.dataset.batch(row).flatten(1) if self.features is None else self.features[row] for row in rows)
        _, places = nearest_of(points.to(self.extractor.device), batches)
        return self.dataset.batch(places).cpu()  # type: ignore[no-any-return]
