"""Batch-norm statistics of averaged weights: estimated anew, on training images noised as in training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_ema.averaging.batch_norm import update_batch_norm
from ddpm_ema.config import Config
from ddpm_ema.keyed_random import Purpose, integers, seed_for

BATCHES, BATCH_SIZE = 16, 128


def with_own_statistics(
    weights: Mapping[str, Tensor],
    config: Config,
    objective: Any,
    build: Callable[[], nn.Module],
    load: Callable[[], Any],
) -> dict[str, Tensor]:
    """The weights of an average with the batch-norm statistics that belong to them (Izmailov et al. 2018, section 3.2).

    Statistics that training collected are those of the raw weights. New ones are means over 16 batches of up to 128 training
    images, whose choice, noise, timesteps and flips are functions of `config.seed`. Without batch norm nothing is built or read.

    Args:
        weights: parameters and buffers by name.
        config: settings of the run; `seed` and `data.horizontal_flip` are used.
        objective: the `diffusion.Objective` of the run.
        build: gives a network that these weights fit, on the objective's device; it is overwritten.
        load: gives the data set that was trained on.

    Returns:
        `weights`, or a copy with other statistics on the network's device.
    """
    if not any(name.endswith("running_var") for name in weights):
        return dict(weights)
    network = build()
    network.load_state_dict(dict(weights))

    def predict(inputs: tuple[Tensor, Tensor, Tensor, Tensor | None]) -> object:
        x_0, noise, timesteps, labels = inputs
        x_t = objective.add_noise(x_0, noise, timesteps)
        return network(x_t, timesteps, class_labels=labels, return_dict=False)

    device = next(network.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed_for(config.seed, Purpose.BATCH_NORM, 0))  # of dropout, which training mode has
        update_batch_norm(network, _batches(config, objective, load()), call=predict)
    return {**weights, **{name: buffer for name, buffer in network.named_buffers() if name in weights}}


def _batches(config: Config, objective: Any, dataset: Any) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    positions = torch.arange(min(BATCH_SIZE, len(dataset)))
    for batch in range(BATCHES):
        indices = integers(config.seed, Purpose.BATCH_NORM, batch, positions, len(dataset))
        labels = None
        if config.model.class_conditional:
            labels = dataset.labels[indices]
            labels = objective.drop_labels(labels, dataset.num_classes, config.seed, batch, positions)
        flip = config.data.horizontal_flip
        yield objective.inputs(config.seed, batch, positions, dataset.batch(indices), labels, flip)
