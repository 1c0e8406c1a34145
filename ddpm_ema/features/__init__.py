"""Images → features: the Inception network of the FID, any backbone of timm, or a classifier trained on the data set itself."""

from ddpm_ema.features.classifier import (
    Architecture,
    Classifier,
    Trained,
    read_metadata,
    save_classifier,
    train_classifier,
)
from ddpm_ema.features.extractor import Extractor, full_precision, open_extractor
