"""The Fréchet distance between two Gaussians, fast against a fixed reference.

|mu_1 − mu_2|² + tr(Σ_1 + Σ_2 − 2 (Σ_1 Σ_2)^½): Dowson & Landau 1982; as a metric of generated images, Heusel et al. 2017.
"""

from functools import cached_property

import torch
from torch import Tensor

from ddpm_ema.errors import UserError
from ddpm_ema.metrics.statistics import Statistics


def check_statistics(statistics: Statistics, name: str) -> None:
    """Raises UserError where a mean or covariance is NaN or infinite."""
    for part, tensor in (("mean", statistics.mu), ("covariance", statistics.sigma)):
        if not torch.isfinite(tensor).all():
            raise UserError(f"{name}: the {part} of the features is not finite: the images or the features are broken")


class FrechetReference:
    """One side of the distance held fixed, so that many others are compared with it at the price of one `eigvalsh` each.

    (Σ Σ_ref)^½ has the trace of (Lᵀ Σ L)^½ for any L with L Lᵀ = Σ_ref, which is symmetric: its eigenvalues are real, and
    found several times faster than those of the product. Agrees with torch-fidelity's distance to rounding.
    """

    def __init__(self, statistics: Statistics, device: torch.device | str = "cpu") -> None:
        check_statistics(statistics, "the reference")
        self.statistics = statistics
        self.device = torch.device(device)
        self.mu = statistics.mu.double().to(self.device)
        self.trace = float(statistics.sigma.double().trace())

    @cached_property
    def factor(self) -> Tensor:
        """L, float64 [d, d], with L Lᵀ = Σ_ref: Cholesky's, or where Σ_ref is singular its symmetric root (20 times slower)."""
        sigma = self.statistics.sigma.double().to(self.device)
        lower, failed = torch.linalg.cholesky_ex(sigma)
        if not failed:
            return lower
        values, vectors = torch.linalg.eigh(sigma)
        return (vectors * values.clamp(min=0).sqrt()) @ vectors.T

    def distance(self, mu: Tensor, sigma: Tensor) -> float:
        """To a Gaussian of mean `mu` [d] and covariance `sigma` [d, d]."""
        sigma = sigma.double().to(self.device)
        offset = mu.double().to(self.device) - self.mu
        return self.of_parts(float(offset @ offset), float(sigma.trace()), self.factor.T @ sigma @ self.factor)

    def of_parts(self, squared_offset: float, trace: float, whitened: Tensor) -> float:
        """From |mu − mu_ref|², tr Σ and any symmetric matrix with the nonzero eigenvalues of Lᵀ Σ L."""
        # Rounding leaves eigenvalues of a singular product a little below zero.
        root_trace = float(torch.linalg.eigvalsh(whitened).clamp(min=0).sqrt().sum())
        return squared_offset + trace + self.trace - 2 * root_trace
