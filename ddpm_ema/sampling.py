"""Seeds to uint8 images: diffusers' ancestral DDPM, DDIM and DPM-Solver++, with noise keyed by image and sampling step.

Image i is a function of (seed, i, weights, sampler) alone. Nothing here touches a random generator, so the number of
processes, the batch size and the order of the images change an image by rounding at most.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import diffusers
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ddpm_ema import keyed_random
from ddpm_ema.config import EvaluationSettings
from ddpm_ema.errors import UserError
from ddpm_ema.keyed_random import Purpose
from ddpm_ema.network_call import Predict

# diffusers' schedulers carry no types.
DDPMScheduler: Any = diffusers.DDPMScheduler
DDIMScheduler: Any = diffusers.DDIMScheduler
DPMSolverMultistepScheduler: Any = diffusers.DPMSolverMultistepScheduler

PROTOCOL = 2
"""Raised whenever the same settings give other images or features on purpose; part of every scoring's identity."""

LAMBDA_MIN = -5.1
"""log(alpha / sigma) of the noisiest level that DPM-Solver++ starts from without clipping, as diffusers advises.

A cosine schedule ends so close to pure noise that predicted noise, divided by alpha there, says nothing about x_0: unclipped,
every pixel of the samples saturates. Clipped, the bound changes nothing that could be measured (docs/scoring.md).
"""


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


def scheduler_for(noise_scheduler_config: Mapping[str, Any], settings: EvaluationSettings) -> Any:
    """The diffusers scheduler that samples as `settings` say; what a pipeline folder holds.

    DPMSolverMultistepScheduler is of second order in x_0 (Lu et al. 2022, arXiv 2211.01095). Its thresholding at a
    `sample_max_value` of 1 is plain clipping: whatever quantile of |x_0| diffusers finds, it clamps it to [1, 1] before it clips to
    it and divides by it.
    """
    # As keywords: from_config drops what `_use_default_values` in a config lists, even where it has another value.
    options: dict[str, Any] = {"clip_sample": settings.clip_sample}
    if settings.sampler == "ddpm":
        return DDPMScheduler.from_config(noise_scheduler_config, **options)
    betas = DDPMScheduler.from_config(noise_scheduler_config).betas
    if noise_scheduler_config.get("beta_schedule") == "sigmoid":  # which DDPMScheduler alone knows
        options["trained_betas"] = betas.tolist()
    if settings.sampler == "ddim":
        return DDIMScheduler.from_config(noise_scheduler_config, **options, set_alpha_to_one=True)
    options |= {"thresholding": settings.clip_sample, "sample_max_value": 1.0}
    options |= {"solver_order": 2, "algorithm_type": "dpmsolver++", "final_sigmas_type": "zero"}
    options["rescale_betas_zero_snr"] = bool(betas[-1] == 1)  # of no signal, which has no logarithm, it makes a little
    return DPMSolverMultistepScheduler.from_config(noise_scheduler_config, **options)


def usable_levels(noise_scheduler_config: Mapping[str, Any], settings: EvaluationSettings) -> int:
    """How many noise levels the sampler may start from, and so its most steps.

    All of them; for DPM-Solver++ without clipping those with log(alpha / sigma) >= LAMBDA_MIN.
    """
    if settings.sampler == "dpm_solver++" and not settings.clip_sample:
        return int((scheduler_for(noise_scheduler_config, settings).lambda_t >= LAMBDA_MIN).sum())
    return int(noise_scheduler_config["num_train_timesteps"])


class Sampler:
    """A diffusers sampler over the training run's noise levels: `len(sampler)` network evaluations per image.

    Timesteps are spaced 'trailing' (Lin et al. 2023, arXiv 2305.08891, table 2): sampling starts at the last usable
    noise level. Every step goes exactly to the next chosen timestep; the last one gives the predicted x_0.

    Raises UserError for more steps than there are usable noise levels.
    """

    def __init__(self, noise_scheduler_config: Mapping[str, Any], settings: EvaluationSettings) -> None:
        self.kind, steps = settings.sampler, settings.num_inference_steps
        self.eta = settings.eta if settings.sampler == "ddim" else 0.0
        self._scheduler = scheduler_for(noise_scheduler_config, settings)
        usable = usable_levels(noise_scheduler_config, settings)
        if steps > usable:
            levels, way_out = int(noise_scheduler_config["num_train_timesteps"]), ""
            known = f"{levels} noise levels of the model"
            if usable < levels:
                known = f"{usable} of {levels} noise levels that dpm_solver++ can start from without clipping"
                way_out = ", or evaluation.clip_sample to true"
            raise UserError(
                f"evaluation.num_inference_steps: {steps} is more than the {known}; set it to at most {usable}{way_out}"
            )
        self.timesteps = trailing(usable, steps)
        self._clip = settings.clip_sample
        self._learned = str(noise_scheduler_config["variance_type"]).startswith("learned")
        if self.kind == "ddim":
            self._scheduler = _respaced(self._scheduler, self.timesteps)

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def uses_noise(self) -> bool:
        """Whether steps add noise, so that `step` needs it."""
        return self.kind == "ddpm" or self.eta > 0

    def start(self) -> list[int]:
        """Begin a trajectory; returns the timesteps that the network is asked at, one per step."""
        if self.kind != "ddim":
            self._scheduler.set_timesteps(timesteps=self.timesteps)  # the solver forgets its last predictions, too
        return self.timesteps

    def step(self, index: int, prediction: Tensor, x_t: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_t -> the next sample, float32; `index` counts the steps of the trajectory from 0.

        `prediction` is what the network said at x_t (twice the channels where the variance is learned); `noise` is float32
        like x_t, needed where `uses_noise` at every step but the last.
        """
        if self.kind == "ddpm":
            return self._ancestral(index, prediction, x_t, noise)
        if self._learned:
            prediction = prediction[:, : x_t.shape[1]]
        timestep, options = self._scheduler.timesteps[index], {}
        if self.kind == "ddim":
            # With next to no signal left, the share that eta leaves is rounded to below zero, and its root would be NaN.
            little = 2**-22 if self._scheduler.alphas_cumprod[timestep] < 2**-20 else 0.0
            eta = self.eta * (1 - little) if noise is not None else 0.0  # into x_0 there is no noise to add
            # The noise is derived anew from the clipped x_0: both halves of the step agree (Nichol & Dhariwal 2021).
            options = {"eta": eta, "variance_noise": noise, "use_clipped_model_output": self._clip}
        return self._scheduler.step(prediction, timestep, x_t, **options, return_dict=False)[0]  # type: ignore[no-any-return]

    def _ancestral(self, index: int, prediction: Tensor, x_t: Tensor, noise: Tensor | None) -> Tensor:
        """The last step returns x_0: diffusers adds noise to it where the last timestep is not 0."""
        last = index == len(self) - 1
        assert last or noise is not None
        with _HandOver(torch.zeros_like(x_t) if noise is None else noise) as handed:
            x_next, x_0 = self._scheduler.step(prediction, self.timesteps[index], x_t, return_dict=False)
        assert last or handed.calls == 1, "DDPMScheduler.step no longer draws its noise with one torch.randn"
        return x_0 if last else x_next  # type: ignore[no-any-return]


def _respaced(scheduler: Any, timesteps: Sequence[int]) -> Any:
    """DDIM over the noise levels at `timesteps` alone, counted n - 1 ... 0.

    diffusers' DDIM steps from t to t - T // n, which is not its next timestep unless n divides T.
    """
    chain = DDIMScheduler.from_config(scheduler.config, num_train_timesteps=len(timesteps), timestep_spacing="leading")
    chain.set_timesteps(len(timesteps))
    chain.alphas_cumprod = scheduler.alphas_cumprod[timesteps[::-1]]  # [n]
    return chain


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
    network evaluation (a progress bar; raising there ends the sampling). No indices give no images, and the network is
    not asked. Raises NonFiniteImages for NaN or infinity.
    """
    if len(indices) == 0:
        return torch.zeros(0, *image_shape, dtype=torch.uint8, device=device)
    positions = indices.to(device)
    x_t = keyed_random.normal(seed, Purpose.SAMPLE, 0, positions, tuple(image_shape))  # [n, C, H, W]
    labels = None if labels is None else labels.to(device)
    timesteps = sampler.start()
    for index, timestep in enumerate(timesteps):
        prediction = predict(x_t, torch.full((len(positions),), timestep, device=device), labels)
        noise = None
        if sampler.uses_noise and index + 1 < len(timesteps):
            noise = keyed_random.normal(seed, Purpose.SAMPLE, index + 1, positions, tuple(image_shape))
        x_t = sampler.step(index, prediction, x_t, noise)
        if after_step is not None:
            after_step()
    return to_uint8(x_t)


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] float -> 0..255, to the nearest: rounding down would darken every image by half a level.

    The same arithmetic as in diffusers' pipelines, so that a pixel between two levels goes the same way.
    Raises NonFiniteImages, which a cast to integers would hide.
    """
    bad = ~torch.isfinite(images).flatten(1).all(dim=1)
    if bool(bad.any()):
        raise NonFiniteImages(bad.nonzero().flatten().tolist())
    return (images / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)


class NonFiniteImages(ValueError):
    """Some images of a batch came out as NaN or infinity; `positions` are their places in the batch."""

    def __init__(self, positions: list[int]) -> None:
        super().__init__(f"images at positions {positions} of the batch are not finite")
        self.positions = positions


def labels_for(seed: int, indices: Tensor, known: Tensor) -> Tensor:
    """A class for each image, int64 `[n]`: that of a data set image drawn by (seed, image), so that classes come as often
    as in the data. `known` int64 `[size]` are the data set's labels."""
    return known[keyed_random.integers(seed, Purpose.SAMPLE_LABEL, 0, indices.cpu(), len(known))]


def trailing(levels: int, steps: int) -> list[int]:
    """`steps` timesteps from levels - 1 down, evenly spaced and rounded: 'trailing' of Lin et al. 2023, exactly.

    diffusers walks there in floating point and for some `steps` (61 of 1000) takes one more, to timestep -1.
    """
    return [round(levels * left / steps) - 1 for left in range(steps, 0, -1)]
