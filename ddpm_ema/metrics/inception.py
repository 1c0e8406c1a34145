"""The Inception score, by torch-fidelity's own function, seeded."""

from __future__ import annotations

from torch import Tensor

from ddpm_ema.errors import UserError


def inception_score(logits: Tensor, *, splits: int = 10, seed: int = 0) -> tuple[float, float]:
    """Mean and standard deviation over `splits` (Salimans et al. 2016), capped at the number of images; logits fp32 [n, k]."""
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    if len(logits) < 2:
        raise UserError("the Inception score needs at least 2 images: raise --evaluation.num-images")
    result = isc_features_to_metric(logits.cpu(), splits=min(splits, len(logits)), shuffle=True, rng_seed=seed)
    return float(result[KEY_METRIC_ISC_MEAN]), float(result[KEY_METRIC_ISC_STD])
