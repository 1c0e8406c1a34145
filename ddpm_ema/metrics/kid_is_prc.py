"""KID, Inception score, precision and recall from features in memory, by torch-fidelity's own functions, seeded."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_ema.errors import UserError

NEIGHBOURS = 3  # k of precision and recall, Kynkäänniemi et al. 2019
BATCH = 10_000  # rows of a distance matrix held at once; torch-fidelity's own default


def kernel_distance(
    features: Tensor, reference: Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Squared maximum mean discrepancy, cubic polynomial kernel (Bińkowski et al. 2018): mean over subsets, std between them.

    Unbiased, so the mean may be below zero. The subsets depend on (seed, n, m) alone: the same images for all weights.

    Args:
        features: float32 `[n, d]`.
        reference: float32 `[m, d]`.
        subsets: how many.
        subset_size: images per subset; at most the smaller of n and m.
        seed: of the choice of subsets.

    Raises:
        UserError: fewer than 2 images on a side.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    size = min(subset_size, len(features), len(reference))
    if size < 2:
        raise UserError("the kernel distance needs at least 2 images on both sides: raise --evaluation.num-images")
    result = kid_features_to_metric(
        features.cpu(), reference.cpu(), kid_subsets=subsets, kid_subset_size=size, rng_seed=seed, verbose=False
    )
    return float(result[KEY_METRIC_KID_MEAN]), float(result[KEY_METRIC_KID_STD])


def inception_score(logits: Tensor, *, splits: int = 10, seed: int = 0) -> tuple[float, float]:
    """Mean and standard deviation over `splits` (Salimans et al. 2016), capped at the number of images; logits fp32 [n, k]."""
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    if len(logits) < 2:
        raise UserError("the Inception score needs at least 2 images: raise --evaluation.num-images")
    result = isc_features_to_metric(logits.cpu(), splits=min(splits, len(logits)), shuffle=True, rng_seed=seed)
    return float(result[KEY_METRIC_ISC_MEAN]), float(result[KEY_METRIC_ISC_STD])


def neighbour_radii(features: Tensor) -> Tensor:
    """Distance [n] from each feature [n, d] to its third nearest neighbour: fp32, on the CPU."""
    from torch_fidelity.metric_prc import calc_cdist_part

    if len(features) <= NEIGHBOURS:
        raise UserError(
            f"precision and recall need more than {NEIGHBOURS} images on both sides and there are {len(features)}: "
            "raise --evaluation.num-images, or set --evaluation.precision-recall false"
        )
    parts = [
        calc_cdist_part(rows, features, BATCH).kthvalue(NEIGHBOURS + 1).values  # the nearest is the feature itself
        for rows in features.split(BATCH)
    ]
    return torch.cat(parts)


def precision_recall(features: Tensor, reference: Tensor, reference_radii: Tensor | None = None) -> tuple[float, float]:
    """Precision (features within the reference's balls) and recall (the reverse), k = 3 (Kynkäänniemi et al. 2019).

    What torch-fidelity's `prc_features_to_metric` computes, but the reference's radii, the largest part, may be given:
    they are the same for all weights. Holds `BATCH` rows of the distance matrix at once. Works on the features' device.
    """
    from torch_fidelity.metric_prc import calc_cdist_part

    reference = reference.to(features.device)
    radii = neighbour_radii(features)
    if reference_radii is None:
        reference_radii = neighbour_radii(reference)
    covered = [(calc_cdist_part(rows, features, BATCH) <= radii).any(dim=1) for rows in reference.split(BATCH)]
    inside = [(calc_cdist_part(rows, reference, BATCH) <= reference_radii).any(dim=1) for rows in features.split(BATCH)]
    return float(torch.cat(inside).double().mean()), float(torch.cat(covered).double().mean())
