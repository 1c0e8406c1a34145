"""Images → features: the Inception network of the FID, any backbone of timm, or a classifier trained on the data set itself.

`extractor` (the object that scoring uses), `inception` and `timm_backbone` (networks of others, from files whose sha256 is
recorded), `classifier` (our own network and its training).
"""

from ddpm_ema.features.classifier import (
    Architecture,
    Classifier,
    Trained,
    read_metadata,
    save_classifier,
    train_classifier,
)
from ddpm_ema.features.extractor import Extractor, full_precision, open_extractor
