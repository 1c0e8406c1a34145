"""One-hot parameters: after step t they are the t-th unit vector, so an average of them *is* its weighting profile."""

from collections.abc import Callable

import numpy as np
import torch

from ddpm_ema.averaging import AverageBank, Profile


def unit(step: int, size: int) -> torch.Tensor:
    """The parameters after `step` steps: fp32 [size], entry 0 stands for the initial ones."""
    vector = torch.zeros(size)
    vector[step] = 1.0
    return vector


def kept_weighting(profile: Profile, num_steps: int, every: int = 1) -> np.ndarray:
    """What a bank updated every `every` of `num_steps` steps really gives each step: float64 [num_steps + 1], 0 = initial."""
    parameter = unit(0, num_steps + 1)
    bank = AverageBank([("weight", parameter)], {"average": profile})
    for step in range(every, num_steps + 1, every):
        parameter.copy_(unit(step, num_steps + 1))
        bank.update(step, every)
    return bank.weights("average")["weight"].double().numpy()


def peer_weighting(num_steps: int, make: Callable[[torch.nn.Module], Callable[[], torch.Tensor]]) -> np.ndarray:
    """What a peer gives each step: `make(module)` returns a function that updates it and returns its average."""
    module = torch.nn.Linear(num_steps + 1, 1, bias=False)
    module.weight.data.copy_(unit(0, num_steps + 1))
    update = make(module)
    average = module.weight
    for step in range(1, num_steps + 1):
        module.weight.data.copy_(unit(step, num_steps + 1))
        average = update()
    return average.detach().double().numpy().ravel()
