"""The training objective over a diffusers scheduler.

Ho et al. 2020 (DDPM, https://arxiv.org/abs/2006.11239), with the learned variance of Nichol & Dhariwal 2021
(https://arxiv.org/abs/2102.09672), v-prediction of Salimans & Ho 2022 (https://arxiv.org/abs/2202.00512) and the
min-SNR weighting of Hang et al. 2023 (https://arxiv.org/abs/2303.09556). Timestep t counts from 0, as diffusers has it:
x_t at t = 0 already carries the first portion of noise.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from ddpm_ema import keyed_random
from ddpm_ema.config import DiffusionSettings
from ddpm_ema.network_call import Predict
from ddpm_ema.transfer import to_device

Inputs: TypeAlias = "tuple[Tensor, Tensor, Tensor, Tensor | None]"
"""x_0 and noise fp32 `[n, C, H, W]`, timesteps int64 `[n]`, labels int64 `[n]` or None."""

SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2", "sigmoid": "sigmoid"}
VARIANCES = {"fixed_small": "fixed_small", "fixed_large": "fixed_large", "learned": "learned_range"}
_VLB_WEIGHT = 1e-3  # lambda of Nichol & Dhariwal 2021, eq. 16


def noise_scheduler(settings: DiffusionSettings) -> DDPMScheduler:
    """The scheduler of training, sampling and export: the only place where settings become betas."""
    return DDPMScheduler(
        num_train_timesteps=settings.num_train_timesteps,
        beta_schedule=SCHEDULES[settings.schedule],
        beta_start=settings.beta_start,
        beta_end=settings.beta_end,
        prediction_type=settings.prediction,
        variance_type=VARIANCES[settings.variance],
        timestep_spacing="trailing",
    )


class Objective:
    """The training loss, one value per image. Noising and loss are fp32, also under autocast."""

    def __init__(self, settings: DiffusionSettings) -> None:
        self.settings = settings
        scheduler: Any = noise_scheduler(settings)
        # In float64 from the scheduler's fp32 table, rounded once, so that training and sampling agree on x_t.
        alphas_cumprod = scheduler.alphas_cumprod.double()
        self._signal = alphas_cumprod.sqrt().float()
        self._sigma = (1 - alphas_cumprod).sqrt().float()
        self._weight = _loss_weight(alphas_cumprod, settings).float()
        self._posterior = _Posterior(alphas_cumprod) if settings.variance == "learned" else None

    def to(self, device: torch.device | str) -> Objective:
        """Moves the tables to `device`, in place; returns self."""
        self._signal, self._sigma, self._weight = (t.to(device) for t in (self._signal, self._sigma, self._weight))
        if self._posterior is not None:
            self._posterior.to(device)
        return self

    def timesteps(self, seed: int, step: int, positions: Tensor) -> Tensor:
        """A timestep in [0, T) per position (int64 `[n]`) in the global batch: int64 `[n]`."""
        return keyed_random.integers(
            seed, keyed_random.Purpose.TIMESTEP, step, positions, self.settings.num_train_timesteps
        )

    def drop_labels(self, labels: Tensor, no_label: int, seed: int, step: int, positions: Tensor) -> Tensor:
        """`labels` (int64 `[n]`), each replaced by `no_label` with probability `diffusion.label_dropout`."""
        drawn = keyed_random.uniform(seed, keyed_random.Purpose.LABEL_DROPOUT, step, positions)
        return torch.where((drawn < self.settings.label_dropout).to(labels.device), no_label, labels)

    def inputs(
        self, seed: int, step: int, positions: Tensor, images: Tensor, labels: Tensor | None, flip: bool
    ) -> Inputs:
        """What `loss` takes at these positions (int64 `[n]`, on the CPU) of a global batch, on the objective's device.

        `images` are uint8 `[n, C, H, W]`; `flip` mirrors half of them. Everything drawn has the key (seed, step, position).
        """
        device = self._signal.device
        x_0 = to_device(images, device).float() / 127.5 - 1
        # Numbers that are few are drawn on the host: on CUDA each would cost a hundred launches of tiny kernels.
        if flip:
            flipped = keyed_random.uniform(seed, keyed_random.Purpose.FLIP, step, positions) < 0.5  # bool [n]
            x_0 = torch.where(to_device(flipped, device)[:, None, None, None], x_0.flip(-1), x_0)
        at = to_device(positions, device)
        noise = keyed_random.normal(seed, keyed_random.Purpose.NOISE, step, at, tuple(x_0.shape[1:]))
        timesteps = to_device(self.timesteps(seed, step, positions), device)
        return x_0, noise, timesteps, None if labels is None else to_device(labels, device)

    def add_noise(self, x_0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise, fp32 (Ho et al. 2020, eq. 4)."""
        signal, sigma = _per_image(self._signal, timesteps), _per_image(self._sigma, timesteps)
        return signal * x_0.float() + sigma * noise.float()

    def loss(
        self, predict: Predict, x_0: Tensor, noise: Tensor, timesteps: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        """The simple loss, a mean over C, H, W; for a learned variance the hybrid loss (Nichol & Dhariwal 2021, eq. 16).

        The hybrid loss adds 0.001 times the variational bound in bits per dimension, without the mean's gradient. The arguments are
        `Inputs`, the result is fp32 `[n]`.
        """
        x_0, noise = x_0.float(), noise.float()
        x_t = self.add_noise(x_0, noise, timesteps)
        output = predict(x_t, timesteps, labels)
        with torch.autocast(x_t.device.type, enabled=False):
            output = output.float()
            prediction = output
            if self._posterior is not None:
                prediction, variance = output.chunk(2, dim=1)
            error = prediction - self._target(x_0, noise, timesteps)
            loss = self._weight[timesteps] * error.square().flatten(1).mean(dim=1)
            if self._posterior is not None:
                mean_x_0 = self.predicted_x_0(prediction.detach(), x_t, timesteps)
                bound = self._posterior.bits_per_dimension(x_0, x_t, mean_x_0, variance, timesteps)
                loss = loss + _VLB_WEIGHT * self.settings.num_train_timesteps * bound
            return loss

    def _target(self, x_0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The output of a perfect network."""
        if self.settings.prediction == "epsilon":
            return noise
        if self.settings.prediction == "sample":
            return x_0
        signal, sigma = _per_image(self._signal, timesteps), _per_image(self._sigma, timesteps)
        return signal * noise - sigma * x_0  # Salimans & Ho 2022, appendix D

    def predicted_x_0(self, prediction: Tensor, x_t: Tensor, timesteps: Tensor) -> Tensor:
        """The x_0 that a prediction implies, not clipped."""
        if self.settings.prediction == "sample":
            return prediction
        signal, sigma = _per_image(self._signal, timesteps), _per_image(self._sigma, timesteps)
        if self.settings.prediction == "epsilon":
            return (x_t - sigma * prediction) / signal
        return signal * x_t - sigma * prediction


def _per_image(table: Tensor, timesteps: Tensor) -> Tensor:
    return table[timesteps][:, None, None, None]  # [n, 1, 1, 1]


def _loss_weight(alphas_cumprod: Tensor, settings: DiffusionSettings) -> Tensor:
    """Weight of the squared error per timestep (Hang et al. 2023, section 3.4): min(SNR, gamma) in units of x_0's error."""
    if settings.min_snr_gamma is None:
        return torch.ones_like(alphas_cumprod)
    snr = alphas_cumprod / (1 - alphas_cumprod)
    clamped = snr.clamp(max=settings.min_snr_gamma)
    units = {"sample": torch.ones_like(snr), "epsilon": snr, "v_prediction": snr + 1}
    return clamped / units[settings.prediction]


class _Posterior:
    """q(x_{t-1} | x_t, x_0) of Ho et al. 2020, eq. 7, and the bound on it that trains a learned variance."""

    def __init__(self, alphas_cumprod: Tensor) -> None:
        previous = torch.cat([torch.ones_like(alphas_cumprod[:1]), alphas_cumprod[:-1]])
        # From the table that diffusers' samplers use; the scheduler's betas differ in rounding, and so would x_0 at t = 0.
        betas = 1 - alphas_cumprod / previous
        self._from_x_0 = (betas * previous.sqrt() / (1 - alphas_cumprod)).float()
        self._from_x_t = ((1 - previous) * (1 - betas).sqrt() / (1 - alphas_cumprod)).float()
        variance = betas * (1 - previous) / (1 - alphas_cumprod)
        variance[0] = variance[1]  # zero at the last denoising step, but its logarithm must be finite
        self._log_small, self._log_large = variance.log().float(), betas.log().float()

    def to(self, device: torch.device | str) -> None:
        for name, table in vars(self).items():
            setattr(self, name, table.to(device))

    def bits_per_dimension(
        self, x_0: Tensor, x_t: Tensor, predicted_x_0: Tensor, variance: Tensor, timesteps: Tensor
    ) -> Tensor:
        """L_t per image in bits per dimension, fp32 `[n]`: KL(q || p) for t > 0, -log p(x_0 | x_1) for t = 0.

        `variance` in [-1, 1] interpolates the logarithm from the posterior's variance to beta_t (Nichol & Dhariwal 2021, eq. 15).
        """
        log_small, log_large = _per_image(self._log_small, timesteps), _per_image(self._log_large, timesteps)
        fraction = (variance + 1) / 2
        log_variance = fraction * log_large + (1 - fraction) * log_small
        mean = self._mean(predicted_x_0, x_t, timesteps)
        divergence = _gaussian_divergence(self._mean(x_0, x_t, timesteps), log_small, mean, log_variance)
        decoder = -_discretized_gaussian_log_likelihood(x_0, mean, log_variance / 2)
        nats = torch.where((timesteps == 0)[:, None, None, None], decoder, divergence)
        return nats.flatten(1).mean(dim=1) / math.log(2)

    def _mean(self, x_0: Tensor, x_t: Tensor, timesteps: Tensor) -> Tensor:
        return _per_image(self._from_x_0, timesteps) * x_0 + _per_image(self._from_x_t, timesteps) * x_t


def _gaussian_divergence(mean_q: Tensor, log_variance_q: Tensor, mean_p: Tensor, log_variance_p: Tensor) -> Tensor:
    """KL divergence of two Gaussians, elementwise, in nats."""
    difference = log_variance_q - log_variance_p
    return 0.5 * (difference.exp() - 1 - difference + (mean_q - mean_p).square() * (-log_variance_p).exp())


def _discretized_gaussian_log_likelihood(x_0: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log-probability of each 8-bit level's bin under a Gaussian; the end bins are open (Ho et al. 2020, eq. 13).

    `x_0` is k / 127.5 - 1. A bin is integrated as a difference of upper tails, from the mean towards x_0 and in logarithms, so that
    the value and gradient of a far bin do not underflow.
    """
    inverse_std = (-log_std).exp()
    distance = (x_0 - mean).abs() * inverse_std
    half_width = inverse_std / 255
    # An end bin is open on the side away from the other levels: outwards if x_0 lies beyond the mean, else inwards.
    end = x_0.abs() > 0.999
    beyond = torch.where(x_0 < 0, x_0 <= mean, x_0 >= mean)
    near = torch.special.log_ndtr(-torch.where(end & ~beyond, -torch.inf, distance - half_width))
    far = torch.special.log_ndtr(-torch.where(end & beyond, torch.inf, distance + half_width))
    inside: Tensor = -(far - near).expm1()
    return near + inside.log()
