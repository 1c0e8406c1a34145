"""Batch-norm statistics for averaged weights."""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import update_bn


class _Calls(nn.Module):
    """A model as `update_bn` wants it: called with one batch."""

    def __init__(self, model: nn.Module, call: Callable[[Any], object]) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, batch: Any) -> object:
        return self.call(batch)


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
        device: where to put the model's input.
        call: passes one batch, as the loader gives it, to the model; by default `model(batch)`. It moves the batch itself.

    Raises:
        ValueError: the loader is empty (the statistics would be lost), or `device` and `call` are both given.
    """
    if device is not None and call is not None:
        raise ValueError("device: leave it out and move the batch in `call`")
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta, training = [norm.momentum for norm in norms], model.training
    if not norms:
        return
    batches = iter(loader)
    try:
        first = next(batches)
    except StopIteration:
        raise ValueError("loader: expected at least one batch to estimate batch-norm statistics from") from None
    whole: Iterable[Any] = itertools.chain([first], batches)
    called = model
    if call is not None:
        called, whole = _Calls(model, call), ([batch] for batch in whole)  # update_bn takes a tuple's first element
    try:
        update_bn(whole, called, device=None if device is None else torch.device(device))
    finally:  # update_bn itself restores nothing after an error
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        model.train(training)
