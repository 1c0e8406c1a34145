"""To and from other libraries' averages, with the profile that their weights really have.

diffusers' `EMAModel` names a decay and warms it up by a schedule of its own, always; torch's `AveragedModel` copies at its
first call. Both are profiles like any other once written down, so that a bank can go on with them exactly.
"""

from __future__ import annotations

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
from ddpm_ema.averaging.files import save_tensors
from ddpm_ema.averaging.naming import check_tensors, clean_named
from ddpm_ema.averaging.profiles import ConstantDecay, Delayed, Profile, Uniform, Warmup
from ddpm_ema.averaging.snapshots import open_safetensors

_WEIGHTS = "diffusion_pytorch_model.safetensors"
_INDEX = _WEIGHTS + ".index.json"


@dataclass(frozen=True)
class ForeignAverage:
    """An average read from another library.

    Attributes:
        weights: clean parameter name -> fp32 CPU tensor; `AverageBank.load_weights` takes it.
        step: updates that it has seen.
        profile: the one the weights really have; a bank made with it goes on exactly.
        claimed: the decay it goes by.
        notes: in plain sentences, how the two differ.
        buffers: clean buffer name -> tensor.
    """

    weights: dict[str, Tensor]
    step: int
    profile: Profile
    claimed: float | None
    notes: list[str]
    buffers: dict[str, Tensor] = field(default_factory=dict)


def read_diffusers_ema(folder: str | Path) -> ForeignAverage:
    """An average from a folder that diffusers' `EMAModel.save_pretrained` (or `write_diffusers_ema`) wrote.

    Raises:
        ValueError: the folder holds no EMA state, its weights are only there as a pickle (refused), or a file is broken.
        OSError: it cannot be read.
    """
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text())
    if "optimization_step" not in config or "decay" not in config:
        raise ValueError(
            f"{folder / 'config.json'}: no EMA state in it ('decay', 'optimization_step'): is this a plain model?"
        )
    weights: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        with open_safetensors(path) as file:
            for name in file.keys():  # noqa: SIM118
                weights[name] = file.get_tensor(name).float().clone()
    return _from_diffusers(clean_named(weights.items(), str(folder)), config)


def read_diffusers_state(state: Mapping[str, Any], named_parameters: Iterable[tuple[str, Tensor]]) -> ForeignAverage:
    """An average from `EMAModel.state_dict()`, whose tensors have no names: paired in order, strictly.

    Args:
        state: the state dict, with its list `shadow_params`.
        named_parameters: `model.named_parameters()` of the model it was made for.

    Raises:
        ValueError: another number of tensors than the model has, or one of another shape (diffusers itself takes as many as
            there are, and says nothing).
    """
    parameters = list(named_parameters)
    shadow = state.get("shadow_params") if isinstance(state, Mapping) else None
    if shadow is None:
        raise ValueError("state: expected the state of diffusers' EMAModel, with 'shadow_params'")
    if len(shadow) != len(parameters):
        raise ValueError(f"shadow_params: {len(shadow)} tensors for a model of {len(parameters)} parameters")
    named = [(name, tensor) for (name, _), tensor in zip(parameters, shadow, strict=True)]
    check_tensors(dict(named), {name: parameter.shape for name, parameter in parameters}, "shadow_params")
    weights = {name: t.detach().float().cpu().clone() for name, t in clean_named(named, "shadow_params").items()}
    return _from_diffusers(weights, state)


def _from_diffusers(weights: dict[str, Tensor], state: Mapping[str, Any]) -> ForeignAverage:
    known = {f.name for f in fields(DiffusersDecay)}
    settings = {name: value for name, value in state.items() if name in known}
    profile = DiffusersDecay(max_decay=state["decay"], **settings)
    step = int(state["optimization_step"])
    return ForeignAverage(weights, step, profile, float(state["decay"]), _diffusers_notes(profile, step))


def _diffusers_notes(profile: DiffusersDecay, step: int) -> list[str]:
    """Where the last step's decay, and the whole average, are not what the claimed decay would give."""
    if step < 1:
        return ["It has seen no step: its weights are the initial ones."]
    claimed, real = profile.max_decay, profile.decay(step)
    constant = ConstantDecay(claimed)
    initial = constant.initial_weight(step)
    rest = f" and still be {initial:.1%} initial weights" if initial >= 0.0005 else ""
    if math.isclose(real, claimed, rel_tol=1e-12):
        reached = int(np.argmax(profile.decays(1, step) >= claimed)) + 1
        return [
            f"EMAModel's warm-up ended at step {reached} of {step}: since then the decay is the claimed {claimed:g}."
        ]
    sentence = (
        f"It claims a decay of {claimed:g}, but EMAModel's warm-up has only reached {real:.6g} at step {step}: it averages "
        f"about {profile.effective_window(step):.0f} steps, centred at {profile.centre(step):.1%} of training, where a "
        f"constant {claimed:g} would average about {constant.effective_window(step):.0f}{rest}."
    )
    return [sentence]


def _weight_files(folder: Path) -> list[Path]:
    if (folder / _INDEX).exists():
        index = json.loads((folder / _INDEX).read_text())
        return [folder / name for name in sorted(set(index["weight_map"].values()))]
    if (folder / _WEIGHTS).exists():
        return [folder / _WEIGHTS]
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    if pickles:
        raise ValueError(
            f"{folder}: its weights are a pickle ({pickles[0]}), refused. Save it with safe_serialization=True"
        )
    raise ValueError(f"{folder}: no {_WEIGHTS} in it")


def write_diffusers_ema(
    folder: str | Path,
    weights: Mapping[str, Tensor],
    *,
    profile: Profile,
    step: int,
    model_config: Mapping[str, Any],
) -> None:
    """Write a folder that `EMAModel.from_pretrained(folder, model_cls)` reads and goes on from with the same profile.

    Args:
        folder: made if need be.
        weights: parameter name -> tensor; stored as fp32.
        profile: `ConstantDecay` or `Warmup`, also `Delayed`, or `DiffusersDecay`: an `EMAModel` follows no other.
        step: updates so far.
        model_config: the model's configuration, `dict(model.config)`.

    Raises:
        ValueError: an `EMAModel` cannot go on with this profile.
        OSError: it cannot be written.
    """
    state = {**_diffusers_settings(profile), "optimization_step": int(step)}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stored = {name: tensor.detach().float().cpu() for name, tensor in weights.items()}
    save_tensors(folder / _WEIGHTS, stored, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**model_config, **state}, indent=2, sort_keys=True) + "\n")


def _diffusers_settings(profile: Profile) -> dict[str, Any]:
    """EMAModel's state for a profile."""
    if isinstance(profile, DiffusersDecay):
        settings = profile.settings()
        return {"decay": settings.pop("max_decay"), **settings}
    rule, start = (profile.profile, profile.start) if isinstance(profile, Delayed) else (profile, 0)
    state = {"update_after_step": start - 1}  # EMAModel's s is one step behind ours: it would copy one step longer
    if isinstance(rule, ConstantDecay):  # a floor as high as the ceiling leaves no room for the warm-up
        floor = {"min_decay": rule.decay_per_step, "use_ema_warmup": False, "inv_gamma": 1.0, "power": 2.0 / 3.0}
        return {"decay": rule.decay_per_step, **floor, **state}
    if isinstance(rule, Warmup):
        warmup = {"min_decay": 0.0, "use_ema_warmup": True, "inv_gamma": rule.inv_gamma, "power": rule.power}
        return {"decay": rule.decay_per_step, **warmup, **state}
    raise ValueError(
        f"profile: diffusers' EMAModel cannot go on with {profile!r}, only with a constant or a warmed-up decay; "
        "to ship the weights alone, load them into the model and use its save_pretrained"
    )


def read_averaged_model(state: Mapping[str, Tensor], model: nn.Module, *, decay: float | None = None) -> ForeignAverage:
    """An average from torch's `AveragedModel.state_dict()`.

    Args:
        state: the state dict (from a file: `torch.load(path, weights_only=True)`).
        model: a model of the architecture it averages, for the names; wrapped or not.
        decay: the decay of its EMA function, which the state does not tell; None for its default, equal averaging.

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
    return ForeignAverage(
        weights={n: tensors[n].detach().float().cpu().clone() for n in parameters},
        step=step,
        profile=profile,
        claimed=decay,
        notes=notes,
        buffers={n: tensors[n].detach().cpu().clone() for n in buffers},
    )


def averaged_model_state(
    weights: Mapping[str, Tensor], num_averaged: int, buffers: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """A state dict that torch's `AveragedModel(model).load_state_dict` takes.

    Args:
        weights: parameter name -> tensor, `bank.weights(name)`.
        num_averaged: updates so far; equal averaging goes on from it.
        buffers: buffer name -> tensor, `bank.buffers(name)`.
    """
    named = {**weights, **(buffers or {})}
    counter = {"n_averaged": torch.tensor(num_averaged, dtype=torch.long)}
    return counter | {f"module.{name}": tensor.detach().clone() for name, tensor in named.items()}
