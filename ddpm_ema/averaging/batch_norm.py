"""Batch-norm statistics for averaged weights."""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


def update_batch_norm(
    model: nn.Module,
    loader: Iterable[Any],
    device: torch.device | str | None = None,
    call: Callable[[Any], object] | None = None,
) -> None:
    """Estimate a model's batch-norm statistics for the weights that it holds (Izmailov et al. 2018, section 3.2).

    Averaged weights produce other activations than the weights that they average, so stored statistics are wrong for them. One
    pass over the data with every module in training mode, frozen batch norms too, and the same weight for every batch; momenta
    are restored, and all modules get the model's own mode, also after an error, which leaves the statistics of the batches before
    it. A model without batch norm reads no data.

    Args:
        model: with the averaged weights in it.
        loader: batches: tensors, or tuples whose first element is the model's input.
        device: where to put the model's input; `call` moves its own.
        call: passes one batch, as the loader gives it, to the model; by default `model(batch)`.

    Raises:
        ValueError: the loader is empty (the statistics would be lost).
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    batches = iter(loader)
    if (first := next(batches, None)) is None:
        raise ValueError("loader: expected at least one batch to estimate batch-norm statistics from")
    momenta, training = [norm.momentum for norm in norms], model.training
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all batches
        model.train()
        with torch.no_grad():
            for batch in itertools.chain([first], batches):
                if call is not None:
                    call(batch)
                    continue
                inputs = batch[0] if isinstance(batch, list | tuple) else batch
                model(inputs if device is None else inputs.to(device))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        model.train(training)
