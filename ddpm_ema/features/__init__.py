"""Images → features, by torch-fidelity's extractors or by a classifier trained on the data set itself.

`extractor` (the object that scoring uses), `published_weights` (files whose sha256 is checked before they are opened), `classifier`
(our own network and its training).
"""

from __future__ import annotations

from ddpm_ema.features.classifier import (
    Architecture,
    Classifier,
    Trained,
    load_classifier,
    read_metadata,
    save_classifier,
    train_classifier,
)
from ddpm_ema.features.extractor import CLASSIFIER, Extractor, full_precision, open_extractor

__all__ = [
    "CLASSIFIER",
    "Architecture",
    "Classifier",
    "Extractor",
    "Trained",
    "full_precision",
    "load_classifier",
    "open_extractor",
    "read_metadata",
    "save_classifier",
    "train_classifier",
]
