"""Averages of other libraries, read and written with their true profile, so that a bank with that profile continues exactly."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ddpm_ema.averaging.diffusers_decay import DiffusersDecay
from ddpm_ema.averaging.files import WEIGHTS, open_safetensors, read_json, save_tensors, weight_files
from ddpm_ema.averaging.naming import check_tensors, clean_name, clean_named
from ddpm_ema.averaging.profiles import ConstantDecay, Delayed, Profile, Uniform, Warmup


@dataclass(frozen=True)
class ForeignAverage:
    """An average from another library.

    Attributes:
        weights: clean parameter name -> fp32 CPU tensor, for `AverageBank.load_weights`.
        step: number of its updates.
        profile: its true profile.
        notes: in plain sentences, how the two differ.
        buffers: clean buffer name -> tensor.
    """

    weights: dict[str, Tensor]
    step: int
    profile: Profile
    notes: list[str]
    buffers: dict[str, Tensor] = field(default_factory=dict)


def read_diffusers_ema(folder: str | Path) -> ForeignAverage:
    """An average from a folder that diffusers' `EMAModel.save_pretrained` (or `write_diffusers_ema`) wrote.

    Raises:
        ValueError: the folder holds no EMA state, its weights are a pickle (refused), or a file is broken.
        OSError: it cannot be read.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    if "optimization_step" not in config or "decay" not in config:
        raise ValueError(
            f"{folder / 'config.json'}: no EMA state in it ('decay', 'optimization_step'): is this a plain model?"
        )
    weights: dict[str, Tensor] = {}
    for path in weight_files(folder):
        if not path.is_file():
            raise ValueError(f"{path}: is missing; a pickle (.bin) is refused: save it with safe_serialization=True")
        with open_safetensors(path) as file:
            weights |= {name: file.get_tensor(name).float().clone() for name in file.keys()}  # noqa: SIM118
    return _from_diffusers(clean_named(weights.items(), str(folder)), config)


def read_diffusers_state(state: Mapping[str, Any], named_parameters: Iterable[tuple[str, Tensor]]) -> ForeignAverage:
    """An average from `EMAModel.state_dict()`, whose tensors have no names and are paired with the model's in order.

    Args:
        state: the state dict, with its list `shadow_params`.
        named_parameters: `model.named_parameters()` of the model that it was made for.

    Raises:
        ValueError: number or shapes of the tensors differ from the model's (diffusers itself truncates silently).
    """
    parameters = list(named_parameters)
    shadow = state.get("shadow_params") if isinstance(state, Mapping) else None
    if shadow is None:
        raise ValueError("state: expected the state of diffusers' EMAModel, with 'shadow_params'")
    if len(shadow) != len(parameters):
        raise ValueError(f"shadow_params: {len(shadow)} tensors for a model of {len(parameters)} parameters")
    named = {name: tensor for (name, _), tensor in zip(parameters, shadow, strict=True)}
    check_tensors(named, {name: parameter.shape for name, parameter in parameters}, "shadow_params")
    return _from_diffusers(_fp32(clean_named(named.items(), "shadow_params")), state)


def _from_diffusers(weights: dict[str, Tensor], state: Mapping[str, Any]) -> ForeignAverage:
    known = {f.name for f in fields(DiffusersDecay)}
    profile = DiffusersDecay(max_decay=state["decay"], **{name: state[name] for name in known & state.keys()})
    step = int(state["optimization_step"])
    return ForeignAverage(weights, step, profile, [_diffusers_note(profile, step)])


def _diffusers_note(profile: DiffusersDecay, step: int) -> str:
    """How the decay at `step` and the average differ from those of the claimed decay."""
    if step < 1:
        return "It has seen no step: its weights are the initial ones."
    claimed, reached = profile.max_decay, profile.decay(step)
    constant = ConstantDecay(claimed)
    initial = constant.initial_weight(step)
    rest = f" and still be {initial:.1%} initial weights" if initial >= 0.0005 else ""
    if math.isclose(reached, claimed, rel_tol=1e-12):
        end = int(np.argmax(profile.decays(1, step) >= claimed)) + 1
        return f"EMAModel's warm-up ended at step {end} of {step}: since then the decay is the claimed {claimed:g}."
    return (
        f"It claims a decay of {claimed:g}, but EMAModel's warm-up has only reached {reached:.6g} at step {step}: it averages "
        f"about {profile.effective_window(step):.0f} steps, centred at {profile.centre(step):.1%} of training, where a "
        f"constant {claimed:g} would average about {constant.effective_window(step):.0f}{rest}."
    )


def write_diffusers_ema(
    folder: str | Path,
    weights: Mapping[str, Tensor],
    *,
    profile: Profile,
    step: int,
    model_config: Mapping[str, Any],
) -> None:
    """Write a folder that `EMAModel.from_pretrained(folder, model_cls)` reads and continues with the same profile.

    Args:
        folder: made if need be.
        weights: parameter name -> tensor; stored as fp32.
        profile: `ConstantDecay` or `Warmup`, also `Delayed`, or `DiffusersDecay`: an `EMAModel` has no other.
        step: updates so far.
        model_config: the model's configuration, `dict(model.config)`.

    Raises:
        ValueError: an `EMAModel` cannot continue with this profile.
        OSError: it cannot be written.
    """
    state = {**_diffusers_settings(profile), "optimization_step": int(step)}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / WEIGHTS, _fp32(weights), {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**model_config, **state}, indent=2, sort_keys=True) + "\n")


def _diffusers_settings(profile: Profile) -> dict[str, Any]:
    """EMAModel's state for a profile."""
    rule, start = (profile.profile, profile.start) if isinstance(profile, Delayed) else (profile, 0)
    after = start - 1  # EMAModel's s is one step behind ours: it would copy one step longer
    if isinstance(rule, ConstantDecay):  # a floor as high as the ceiling leaves no room for the warm-up
        profile = DiffusersDecay(rule.decay_per_step, rule.decay_per_step, after)
    elif isinstance(rule, Warmup):
        profile = DiffusersDecay(rule.decay_per_step, 0.0, after, True, rule.inv_gamma, rule.power)
    elif not isinstance(profile, DiffusersDecay):
        raise ValueError(
            f"profile: diffusers' EMAModel cannot go on with {profile!r}, only with a constant or a warmed-up decay; "
            "to ship the weights alone, load them into the model and use its save_pretrained"
        )
    settings = profile.settings()
    return {"decay": settings.pop("max_decay"), **settings}


def read_averaged_model(state: Mapping[str, Tensor], model: nn.Module, *, decay: float | None = None) -> ForeignAverage:
    """An average from torch's `AveragedModel.state_dict()`.

    Args:
        state: the state dict (from a file: `torch.load(path, weights_only=True)`).
        model: a model of the averaged architecture, for the names; wrapped or not.
        decay: the decay of its EMA function, which the state does not hold; None for its default, equal averaging.

    Raises:
        ValueError: not such a state, or a tensor is missing, unknown or misshaped (named, with both shapes).
    """
    if not isinstance(state, Mapping) or "n_averaged" not in state:
        raise ValueError("state: expected the state dict of torch's AveragedModel, with 'n_averaged'")
    tensors = clean_named(((n, t) for n, t in state.items() if n != "n_averaged"), "state")
    parameters = clean_named(model.named_parameters(remove_duplicate=False), "model")
    buffers = {n: t for n, t in clean_named(model.state_dict().items(), "model").items() if n not in parameters}
    check_tensors(tensors, {n: t.shape for n, t in (parameters | buffers).items()}, "state")
    step = int(state["n_averaged"])
    profile: Profile = Uniform() if decay is None else Delayed(ConstantDecay(decay), start=1)
    notes = [f"One step of this average is one call of update_parameters ({step} so far), however often that was."]
    if decay is not None:
        notes.append("Its first call copied the parameters, so the average began there and holds no initial weights.")
    copied = {n: tensors[n].detach().cpu().clone() for n in buffers}
    return ForeignAverage(_fp32({n: tensors[n] for n in parameters}), step, profile, notes, copied)


def averaged_model_state(
    weights: Mapping[str, Tensor],
    num_averaged: int,
    buffers: Mapping[str, Tensor] | None = None,
    *,
    averaged_model: nn.Module | None = None,
) -> dict[str, Tensor]:
    """A state dict for the `load_state_dict` of torch's `AveragedModel`.

    Args:
        weights: `bank.weights(name)`.
        num_averaged: updates so far; equal averaging continues from it.
        buffers: `bank.buffers(name)`.
        averaged_model: the `AveragedModel` to load into, for its names; needed if it averages a wrapped model.
    """
    named = {**weights, **(buffers or {})}
    names = averaged_model.state_dict() if averaged_model else [f"module.{name}" for name in named]
    state = {name: named[clean_name(name)].detach().clone() for name in names if name != "n_averaged"}
    return {"n_averaged": torch.tensor(num_averaged, dtype=torch.long)} | state


def _fp32(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().float().cpu().clone() for name, tensor in tensors.items()}
