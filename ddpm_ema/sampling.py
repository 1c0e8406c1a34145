"""Seeds to uint8 images: diffusers' ancestral DDPM, DDIM and DPM-Solver++, with noise keyed by image and sampling step.

Image i is a function of (seed, i, weights, sampler) alone. Nothing here touches a random generator, so the number of
processes, the batch size and the order of the images change an image by rounding at most.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import diffusers
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ddpm_ema import streams
from ddpm_ema.config import EvaluationSettings
from ddpm_ema.errors import UserError
from ddpm_ema.streams import Stream

# diffusers' schedulers carry no types.
DDPMScheduler: Any = diffusers.DDPMScheduler
DDIMScheduler: Any = diffusers.DDIMScheduler
DPMSolverMultistepScheduler: Any = diffusers.DPMSolverMultistepScheduler

PROTOCOL = 2
"""Raised whenever the same settings give other images or features on purpose; part of every scoring's identity."""

Predict: TypeAlias = "Callable[[Tensor, Tensor, Tensor | None], Tensor]"
"""(x_t float32 `[n, C, H, W]`, timesteps int64 `[n]`, labels int64 `[n]` or None) -> float32 `[n, C or 2C, H, W]`."""


class _HandOver(TorchFunctionMode):
    """Hands `noise` to the one call of `torch.randn` inside: diffusers' ancestral step takes a generator, not noise."""

    def __init__(self, noise: Tensor) -> None:
        super().__init__()
        self.noise = noise
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.randn:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        return self.noise


class Sampler:
    """A diffusers sampler over the training run's noise levels: `len(sampler)` network evaluations an image.

    Timesteps are spaced 'trailing' (Lin et al. 2023, arXiv 2305.08891, table 2): sampling starts at the last noise
    level. DDPM and DDIM run over the respaced chain whose `alphas_cumprod` are those at the chosen timesteps: a step then
    goes exactly to the next chosen timestep, where diffusers' DDIM goes to `t - T // n`, another one unless n divides T.

    Raises UserError for more steps than there are noise levels.
    """

    def __init__(self, noise_scheduler_config: Mapping[str, Any], settings: EvaluationSettings) -> None:
        steps, levels = settings.num_inference_steps, int(noise_scheduler_config["num_train_timesteps"])
        if steps > levels:
            raise UserError(
                f"evaluation.num_inference_steps: {steps} is more than the {levels} noise levels of the model; "
                f"set at most {levels}"
            )
        self.kind = settings.sampler
        self.eta = settings.eta if settings.sampler == "ddim" else 0.0
        base = DDPMScheduler.from_config(dict(noise_scheduler_config))
        self.timesteps = trailing(_usable_levels(base) if self.kind == "dpm_solver++" else levels, steps)
        self._learned = str(base.config.variance_type).startswith("learned")
        self._clip = settings.clip_sample
        self._scheduler: Any = self._solver(base) if self.kind == "dpm_solver++" else self._respaced(base)

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def uses_noise(self) -> bool:
        """Whether steps add noise, so that `step` needs it."""
        return self.kind == "ddpm" or self.eta > 0

    def _respaced(self, base: Any) -> Any:
        """The chain that visits the chosen timesteps alone; its own timesteps are len(self) - 1 ... 0."""
        alphas_cumprod = base.alphas_cumprod[self.timesteps[::-1]]  # [n]
        betas = 1 - alphas_cumprod.double() / torch.cat([torch.ones(1), alphas_cumprod[:-1]]).double()
        chain = {"num_train_timesteps": len(self), "trained_betas": betas.tolist(), "clip_sample": self._clip}
        chain |= {"timestep_spacing": "leading", "prediction_type": base.config.prediction_type}
        if self.kind == "ddpm":
            scheduler = DDPMScheduler(**chain, variance_type=base.config.variance_type)
        else:
            scheduler = DDIMScheduler(**chain, set_alpha_to_one=True)
            scheduler.set_timesteps(len(self))
        scheduler.alphas_cumprod = alphas_cumprod  # rather than the product of the betas, which rounds once more
        return scheduler

    def _solver(self, base: Any) -> Any:
        """The second-order multistep solver in x_0 (Lu et al. 2022, arXiv 2211.01095)."""
        keep = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
        config = {key: base.config[key] for key in keep}
        return DPMSolverMultistepScheduler(
            **config, solver_order=2, algorithm_type="dpmsolver++", final_sigmas_type="zero"
        )

    def start(self) -> list[int]:
        """Begin a trajectory; returns the timesteps that the network is asked at, one a step."""
        if self.kind == "dpm_solver++":
            self._scheduler.set_timesteps(timesteps=self.timesteps)  # forgets the last trajectory's predictions
            self._scheduler.set_begin_index(0)
        return self.timesteps

    def step(self, index: int, prediction: Tensor, x_t: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_t -> the next sample, float32; `index` counts the steps of the trajectory from 0.

        `prediction` is what the network said at x_t (twice the channels where the variance is learned); `noise` is float32
        like x_t, needed where `uses_noise` at every step but the last.
        """
        if self.kind == "ddpm":
            return self._ancestral(len(self) - 1 - index, prediction, x_t, noise)
        if self._learned:
            prediction = prediction[:, : x_t.shape[1]]
        if self.kind == "ddim":
            level = len(self) - 1 - index
            eta = self.eta if noise is not None else 0.0  # into x_0 there is no noise to add
            # The noise is derived anew from the clipped x_0: both halves of the step agree (Nichol & Dhariwal 2021).
            options = {"eta": eta, "variance_noise": noise, "use_clipped_model_output": self._clip}
            return self._move(prediction, level, x_t, **options)
        return self._move(prediction, self._scheduler.timesteps[index], x_t)

    def _move(self, prediction: Tensor, timestep: Any, x_t: Tensor, **options: Any) -> Tensor:
        moved: Tensor = self._scheduler.step(prediction, timestep, x_t, **options, return_dict=False)[0]
        return moved

    def _ancestral(self, level: int, prediction: Tensor, x_t: Tensor, noise: Tensor | None) -> Tensor:
        if level == 0:  # no noise in the image itself; diffusers adds some where the last timestep is not 0
            return self._move(prediction, level, x_t)
        assert noise is not None
        with _HandOver(noise) as handed:
            x_next = self._move(prediction, level, x_t)
        assert handed.calls == 1, "DDPMScheduler.step no longer draws its noise with one torch.randn"
        return x_next


@torch.inference_mode()
def sample(
    predict: Predict,
    sampler: Sampler,
    *,
    seed: int,
    indices: Tensor,
    image_shape: Sequence[int],
    device: torch.device | str,
    labels: Tensor | None = None,
    after_step: Callable[[], None] | None = None,
) -> Tensor:
    """Images `indices` (int64 `[n]`) as uint8 `[n, C, H, W]` on `device`.

    The state is float32 throughout. `labels` int64 `[n]` are handed to `predict`. `after_step` is called after each
    network evaluation (a progress bar; raising there ends the sampling). Raises NonFiniteImages for NaN or infinity.
    """
    positions = indices.to(device)
    x_t = streams.normal(seed, Stream.SAMPLE, 0, positions, tuple(image_shape))  # [n, C, H, W]
    labels = None if labels is None else labels.to(device)
    timesteps = sampler.start()
    for index, timestep in enumerate(timesteps):
        prediction = predict(x_t, torch.full((len(positions),), timestep, device=device), labels)
        noise = None
        if sampler.uses_noise and index + 1 < len(timesteps):
            noise = streams.normal(seed, Stream.SAMPLE, index + 1, positions, tuple(image_shape))
        x_t = sampler.step(index, prediction, x_t, noise)
        if after_step is not None:
            after_step()
    return to_uint8(x_t)


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] float -> 0..255, to the nearest: rounding down would darken every image by half a level.

    Raises NonFiniteImages, which a cast to integers would hide.
    """
    bad = ~torch.isfinite(images).flatten(1).all(dim=1)
    if bool(bad.any()):
        raise NonFiniteImages(bad.nonzero().flatten().tolist())
    return images.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


class NonFiniteImages(ValueError):
    """Some images of a batch came out as NaN or infinity; `positions` are their places in the batch."""

    def __init__(self, positions: list[int]) -> None:
        super().__init__(f"images at positions {positions} of the batch are not finite")
        self.positions = positions


def guided(predict: Predict, scale: float, no_label: int) -> Predict:
    """Classifier-free guidance (Ho & Salimans 2022): without + scale · (with − without), in one pass of twice the batch.

    A learned variance (upper channels) is guided likewise. A scale of 1 needs no second half.
    """
    if scale == 1.0:
        return predict

    def predict_guided(x_t: Tensor, timesteps: Tensor, labels: Tensor | None) -> Tensor:
        assert labels is not None
        both = torch.cat([labels, torch.full_like(labels, no_label)])
        with_label, without = predict(torch.cat([x_t, x_t]), torch.cat([timesteps, timesteps]), both).chunk(2)
        return without.lerp(with_label, scale)

    return predict_guided


def labels_for(seed: int, indices: Tensor, known: Tensor) -> Tensor:
    """A class for each image, int64 `[n]`: that of a data set image drawn by (seed, image), so that classes come as often
    as in the data. `known` int64 `[size]` are the data set's labels."""
    return known[streams.integers(seed, Stream.SAMPLE_LABEL, 0, indices.cpu(), len(known))]


def trailing(levels: int, steps: int) -> list[int]:
    """`steps` timesteps from levels - 1 down, evenly spaced and rounded: 'trailing' of Lin et al. 2023, exactly.

    diffusers walks there in floating point and for some `steps` (61 of 1000) takes one more, to timestep -1.
    """
    return [round(levels * left / steps) - 1 for left in range(steps, 0, -1)]


def _usable_levels(base: Any) -> int:
    """How many noise levels DPM-Solver++ may start from: those with log(alpha / sigma) of at least -5.1.

    A cosine schedule ends so close to pure noise that predicted noise, divided by alpha there, says nothing about x_0,
    and the solver does not clip; diffusers advises this bound (`lambda_min_clipped`). Linear schedules stay above it.
    """
    log_ratio = 0.5 * (torch.log(base.alphas_cumprod) - torch.log1p(-base.alphas_cumprod))
    return int((log_ratio >= -5.1).sum())
