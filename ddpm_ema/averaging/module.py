"""A module that computes with an average's weights, beside the model that is trained."""

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ddpm_ema.averaging.naming import check_tensors, clean_name
from ddpm_ema.averaging.sharded import is_sharded


def with_tensors(model: Any, values: Mapping[str, Tensor], *shared: object) -> nn.Module:
    """A module like `model` in eval mode with these parameters and buffers, else the model's own; they and `shared` are not copied.

    `values` are by clean name; neither the model's tensors nor its mode are touched. Raises ValueError for a name or shape that it
    does not have, or a sharded model, whose hooks set its parameters themselves.
    """
    while hasattr(model, "_orig_mod") or isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    if any(is_sharded(tensor) for _, tensor in tensors):
        raise ValueError("module: of a sharded model make a second one, apply fully_shard to it and use copy_to")
    shapes = {clean_name(name): tensor.shape for name, tensor in tensors}
    check_tensors(values, {name: shape for name, shape in shapes.items() if name in values}, "module")
    # deepcopy takes what it finds here instead of copying it.
    taken: dict[int, object] = {id(one): one for one in (*shared, *(tensor for _, tensor in tensors))}
    for name, tensor in tensors:
        if (value := values.get(clean_name(name))) is not None:
            taken[id(tensor)] = nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value
    found: nn.Module = copy.deepcopy(model, taken).eval()
    return found
