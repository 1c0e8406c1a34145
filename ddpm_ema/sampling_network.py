"""The network that samples, in scoring and in previews: compiled once, weights loaded into it in place, predictions guided."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_ema import network_call
from ddpm_ema.averaging.naming import check_tensors
from ddpm_ema.config import EvaluationSettings
from ddpm_ema.errors import UserError, explained
from ddpm_ema.network_call import Predict

AUTOCAST = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class SamplingNetwork:
    """A network that predicts for the sampler, with `evaluation`'s precision, compilation and guidance.

    A compiled network is compiled for `batch_size` images alone, the most that `predict` is given at once; smaller batches are
    filled up inside, so that nothing is compiled again. `no_label` is the class that means "no label"; None for a network without
    classes, whose guidance is a UserError.
    """

    def __init__(
        self, unet: Any, settings: EvaluationSettings, device: torch.device, batch_size: int, no_label: int | None
    ) -> None:
        self.device, self.batch_size, self.no_label = device, batch_size, no_label
        self.unet = network_call.channels_last(unet.eval().requires_grad_(False).to(device))
        self._dtype = AUTOCAST[settings.mixed_precision]
        self._parameters: dict[str, Tensor] = dict(self.unet.state_dict())
        self._members: list[dict[str, Tensor]] = []
        self._compiled = settings.compile
        self._forward: Callable[..., Tensor] = self._run
        if settings.compile:
            # diffusers asks for its torch version inside the network: that answer does not change.
            warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
            self._forward = torch.compile(self._run, dynamic=False)
        scale = settings.guidance_scale
        if no_label is None and scale != 1.0:
            raise UserError(
                f"evaluation.guidance_scale: {scale} needs a class-conditional model (model.class_conditional); set it to 1"
            )
        self._calls = 2 if scale != 1.0 else 1
        self.predict: Predict = self._predict if no_label is None else guided(self._predict, scale, no_label)

    @torch.no_grad()
    def load(self, members: Sequence[Mapping[str, Tensor]], name: str) -> None:
        """Takes the weights called `name`: one set, or several whose predictions are then averaged at every sampling step.

        Raises UserError that names a tensor which is missing, extra or misshaped. All members of an ensemble stay on the
        device.
        """
        shapes = {key: tensor.shape for key, tensor in self._parameters.items()}
        for weights in members:
            with explained("", ValueError, after="; check the model settings"):
                check_tensors(weights, shapes, f"weights {name}: not of this model")
        self._members = []
        if len(members) > 1:
            self._members = [{k: w[k].to(self.device, torch.float32) for k in self._parameters} for w in members]
        else:
            self._copy(members[0])

    def _copy(self, weights: Mapping[str, Tensor]) -> None:
        """In place, so that what was compiled stays valid."""
        for key, parameter in self._parameters.items():
            parameter.copy_(weights[key])

    def _predict(self, x_t: Tensor, timesteps: Tensor, labels: Tensor | None) -> Tensor:
        """One evaluation of the weights that are loaded: float32, like x_t."""
        if not self._members:
            return self._evaluate(x_t, timesteps, labels)
        total = torch.zeros((), device=x_t.device)
        for weights in self._members:
            self._copy(weights)
            total = total + self._evaluate(x_t, timesteps, labels)
        return total / len(self._members)

    def _evaluate(self, x_t: Tensor, timesteps: Tensor, labels: Tensor | None) -> Tensor:
        n, full = len(x_t), self._calls * self.batch_size
        if self._compiled and n < full:
            x_t, timesteps = _filled(x_t, full), _filled(timesteps, full)
            labels = None if labels is None else _filled(labels, full)
        return self._forward(x_t, timesteps, labels)[:n]

    def _run(self, x_t: Tensor, timesteps: Tensor, labels: Tensor | None) -> Tensor:
        x_t = x_t.contiguous(memory_format=torch.channels_last)
        with torch.autocast(x_t.device.type, dtype=self._dtype, enabled=self._dtype is not None):
            prediction = network_call.predict(self.unet, x_t, timesteps, labels)
        return prediction.float().contiguous()


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


def _filled(rows: Tensor, size: int) -> Tensor:
    """Zeros after the rows, up to `size` of them."""
    return F.pad(rows, (0, 0) * (rows.ndim - 1) + (0, size - len(rows)))
