"""The handwritten digits that come with scikit-learn."""

import numpy as np
import numpy.typing as npt
import torch

from ddpm_ema.data.source import Source
from ddpm_ema.errors import UserError


def open_digits(split: str) -> Source:
    """1,797 images of 8×8 pixels, 17 grey levels scaled to 0..255, ten classes. Raises UserError for another split than `train`."""
    if split != "train":
        raise UserError(f"data.split: the digits have one split, train, and no {split!r}")
    from sklearn.datasets import load_digits  # slow to import, and needed for nothing else

    digits = load_digits()
    images: npt.NDArray[np.uint8] = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    labels = torch.from_numpy(digits.target.astype(np.int64))
    return Source("digits", len(images), images.__getitem__, "digits[{}]".format, ["digits"], labels, 10)
