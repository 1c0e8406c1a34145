"""The optimizer, and its state as tensors with names."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ddpm_ema.config import TrainingSettings


def build_optimizer(parameters: Iterable[nn.Parameter], settings: TrainingSettings) -> torch.optim.Optimizer:
    """Fused Adam or AdamW (Kingma & Ba 2015; Loshchilov & Hutter 2019)."""
    common = (parameters, settings.learning_rate, settings.adam_betas, settings.adam_epsilon)
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(*common, weight_decay=settings.weight_decay, fused=True)
    return torch.optim.Adam(*common, fused=True)


def named_state(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimizer's state as `<entry>/<parameter name>` -> tensor (the live ones, not copies)."""
    return {
        f"{entry}/{name}": value
        for name, parameter in parameters.items()
        for entry, value in optimizer.state.get(parameter, {}).items()
    }


def load_named_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Puts back what `named_state` gave for the same model and optimizer.

    Files are contiguous; fused kernels want moments in the parameter's own memory order.
    """
    for key, value in tensors.items():
        entry, _, name = key.partition("/")
        parameter = parameters[name]
        state = value if entry == "step" else torch.empty_like(parameter, requires_grad=False).copy_(value)
        optimizer.state[parameter][entry] = state.to(parameter.device)
