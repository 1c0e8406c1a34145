"""Batch-norm statistics of averaged weights: estimated anew, on training images noised as in training."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ddpm_ema import data, diffusion, model, network_call
from ddpm_ema.averaging.batch_norm import update_batch_norm
from ddpm_ema.config import Config
from ddpm_ema.keyed_random import Purpose, integers, seed_for

BATCHES, BATCH_SIZE = 16, 128


def with_own_statistics(
    weights: Mapping[str, Tensor], config: Config, device: torch.device | str = "cpu", dataset: Any = None
) -> dict[str, Tensor]:
    """The weights of an average with the batch-norm statistics that belong to them (Izmailov et al. 2018, section 3.2).

    Statistics that training collected are those of the raw weights. New ones are means over 16 batches of up to 128 training
    images, whose choice, noise, timesteps and flips are functions of `config.seed`. Without batch norm nothing is built or read.
    `dataset` is what was trained on; None opens it. Raises UserError where the weights are not of the network that the settings
    describe, or the data cannot be read.
    """
    if not any(name.endswith("running_var") for name in weights):
        return dict(weights)
    images = dataset or data.load(config.data)
    network = model.fitting(config, weights, "an average", lambda: images.num_classes).to(device)
    network.load_state_dict(dict(weights))
    objective = diffusion.Objective(config.diffusion).to(device)

    def predict(inputs: diffusion.Inputs) -> object:
        x_0, noise, timesteps, labels = inputs
        x_t = objective.add_noise(x_0, noise, timesteps)
        return network_call.predict(network, x_t, timesteps, labels)

    with torch.random.fork_rng([device] if torch.device(device).type == "cuda" else []):
        torch.manual_seed(seed_for(config.seed, Purpose.BATCH_NORM, 0))  # of dropout, which training mode has
        update_batch_norm(network, _batches(config, objective, images), call=predict)
    return {**weights, **{name: buffer for name, buffer in network.named_buffers() if name in weights}}


def _batches(config: Config, objective: diffusion.Objective, dataset: Any) -> Iterator[diffusion.Inputs]:
    positions = torch.arange(min(BATCH_SIZE, len(dataset)))
    for batch in range(BATCHES):
        indices = integers(config.seed, Purpose.BATCH_NORM, batch, positions, len(dataset))
        labels = dataset.labels[indices] if config.model.class_conditional else None
        if labels is not None:
            labels = objective.drop_labels(labels, dataset.num_classes, config.seed, batch, positions)
        flip = config.data.horizontal_flip
        yield objective.inputs(config.seed, batch, positions, dataset.batch(indices), labels, flip)
