"""What other programs say of the same numbers."""

from torch_fidelity.metric_fid import fid_statistics_to_metric

from ddpm_ema.metrics import Statistics


def frechet_distance(first: Statistics, second: Statistics) -> float:
    """torch-fidelity's."""
    pair = [{"mu": side.mu.double().numpy(), "sigma": side.sigma.double().numpy()} for side in (first, second)]
    (distance,) = fid_statistics_to_metric(*pair, verbose=False).values()
    return float(distance)
