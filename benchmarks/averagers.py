"""Averages of other libraries, used as documented: name, distribution, documented profile, and how to follow a module.

`follow(module)` returns a function to call after every step, which updates the average and returns its only tensor. Libraries are
imported when they are followed, so any subset may be installed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from ddpm_ema.averaging import (
    AverageBank,
    BiasCorrected,
    ConstantDecay,
    Delayed,
    PowerFunction,
    Profile,
    Uniform,
    Warmup,
)
from ddpm_ema.averaging.profiles import ScheduledDecay

Average = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Contender:
    """An average under its documented name.

    Attributes:
        name: library, class and settings.
        package: its distribution, for the version.
        documented: the profile that its documentation gives for these settings.
        follow: see the module's docstring.
        cause: why the two differ, where they do.
    """

    name: str
    package: str
    documented: Profile
    follow: Callable[[nn.Module], Average]
    cause: str = ""


@dataclass(frozen=True, repr=False)
class Ramp(ScheduledDecay):
    """ultralytics: decay (1 - exp(-t / tau)) at step t."""

    max_decay: float
    tau: float

    def decays(self, first: int, last: int) -> np.ndarray:
        return self.max_decay * -np.expm1(-np.arange(first, last + 1) / self.tau)


@dataclass(frozen=True, repr=False)
class Sync(Profile):
    """TR-DPO: average = (1 - alpha) average + alpha parameters at every multiple of `every`."""

    kind: ClassVar[str]
    alpha: float
    every: int

    def decay(self, step: int, num_steps: int = 1) -> float:
        return (1.0 - self.alpha) ** (step // self.every - (step - num_steps) // self.every)


def ours(profile: Profile, every: int = 1) -> Contender:
    def follow(module: nn.Module) -> Average:
        bank, step = AverageBank(module.named_parameters(), {"average": profile}), 0

        def update() -> torch.Tensor:
            nonlocal step
            step += 1
            if step % every == 0:
                bank.update(step, num_steps=every)
            return bank.weights("average")["weight"]

        return update

    return Contender(f"ddpm_ema {profile!r}" + (f", every {every}" if every > 1 else ""), "ddpm_ema", profile, follow)


def torch_average(documented: Profile, decay: float | None) -> Contender:
    def follow(module: nn.Module) -> Average:
        from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

        averaged = AveragedModel(module, multi_avg_fn=None if decay is None else get_ema_multi_avg_fn(decay))
        return lambda: averaged.update_parameters(module) or averaged.module.weight

    return Contender(
        f"torch AveragedModel, {'equal' if decay is None else f'EMA {decay:g}'}", "torch", documented, follow
    )


def timm_average(version: str, decay: float) -> Contender:
    def follow(module: nn.Module) -> Average:
        import timm.utils

        averaged = getattr(timm.utils, version)(module, decay=decay)
        return lambda: averaged.update(module) or averaged.module.weight

    return Contender(f"timm {version}(decay={decay:g})", "timm", ConstantDecay(decay), follow)


def _settings(settings: dict[str, Any]) -> str:
    return "".join(f", {name}={value}" for name, value in settings.items())


def ema_pytorch_average(beta: float, **settings: Any) -> Contender:
    def follow(module: nn.Module) -> Average:
        from ema_pytorch import EMA

        averaged = EMA(module, beta=beta, **settings)
        return lambda: averaged.update() or averaged.ema_model.weight

    documented = Warmup(beta, inv_gamma=1.0, power=2 / 3)  # "an inverse decay schedule", says its docstring
    cause = "updates every 10 steps with the decay of one; starts after 100 steps"
    return Contender(f"ema-pytorch EMA(beta={beta:g}{_settings(settings)})", "ema-pytorch", documented, follow, cause)


def karras_average(package: str, imports: str, std: float, **settings: Any) -> Contender:
    """The `KarrasEMA` of ema-pytorch and of its two descendants."""

    def follow(module: nn.Module) -> Average:
        import importlib

        averaged = importlib.import_module(imports).KarrasEMA(module, sigma_rel=std, **settings)

        def update() -> torch.Tensor:
            averaged.update()
            return averaged.ema_params["weight"] if hasattr(averaged, "ema_params") else averaged.ema_model.weight

        return update

    every = {"ema-pytorch": 100, "pytorch-posthoc-ema": 10, "nitrous-ema": 100}[package]
    cause = f"updates every {every} steps (its default) with the decay of one step"
    name = f"{package} KarrasEMA(sigma_rel={std:g}{_settings(settings)})"
    return Contender(name, package, PowerFunction(std), follow, cause)


def diffusers_average(decay: float, **settings: Any) -> Contender:
    def follow(module: nn.Module) -> Average:
        from diffusers.training_utils import EMAModel

        averaged = EMAModel(module.parameters(), decay=decay, **settings)
        return lambda: averaged.step(module.parameters()) or averaged.shadow_params[0]

    documented = Warmup(decay) if settings.get("use_ema_warmup") else ConstantDecay(decay)
    cause = "the decay is min(decay, (1 + s) / (10 + s)), also without `use_ema_warmup`"
    return Contender(
        f"diffusers EMAModel(decay={decay:g}{_settings(settings)})", "diffusers", documented, follow, cause
    )


def simpletuner_average(decay: float, interval: int | None = None) -> Contender:
    def follow(module: nn.Module) -> Average:
        from simpletuner.helpers.training.ema import EMAModel

        args = SimpleNamespace(ema_update_interval=interval, ema_device="cpu", ema_cpu_only=True)
        averaged, step = EMAModel(args, None, module.parameters(), decay=decay), 0

        def update() -> torch.Tensor:
            nonlocal step
            step += 1
            averaged.step(module.parameters(), step)
            return averaged.shadow_params[0]

        return update

    given = f", ema_update_interval={interval}" if interval else ""
    cause = "diffusers' hidden warm-up" + ("; updates every 10 steps with the decay of one" if interval else "")
    return Contender(
        f"simpletuner EMAModel(decay={decay:g}{given})", "simpletuner", ConstantDecay(decay), follow, cause
    )


def torch_ema_average(decay: float, **settings: Any) -> Contender:
    def follow(module: nn.Module) -> Average:
        from torch_ema import ExponentialMovingAverage

        averaged = ExponentialMovingAverage(module.parameters(), decay=decay, **settings)
        return lambda: averaged.update() or averaged.shadow_params[0]

    cause = "the decay is min(decay, (1 + t) / (10 + t)) by default (`use_num_updates`)"
    name = f"torch-ema ExponentialMovingAverage(decay={decay:g}{_settings(settings)})"
    return Contender(name, "torch-ema", ConstantDecay(decay), follow, cause)


def lightning_average(documented: Profile, cause: str = "", **settings: Any) -> Contender:
    def follow(module: nn.Module) -> Average:
        from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging

        averaged = EMAWeightAveraging(device="cpu", **settings) if settings else WeightAveraging(device="cpu")
        trainer = SimpleNamespace(global_step=0)
        module.device = torch.device("cpu")
        averaged._average_model = torch.optim.swa_utils.AveragedModel(module, use_buffers=True, **averaged._kwargs)

        def update() -> torch.Tensor:
            trainer.global_step += 1
            averaged.on_train_batch_end(trainer, module, None, None, 0)
            return averaged._average_model.module.weight

        return update

    kind = f"EMAWeightAveraging({_settings(settings)[2:]})" if settings else "WeightAveraging()"
    return Contender(f"lightning {kind}", "lightning", documented, follow, cause)


def composer_average(half_life: int, interval: int) -> Contender:
    def follow(module: nn.Module) -> Average:
        from composer.algorithms.ema.ema import EMA
        from composer.core import Event, Time, Timestamp

        averaged = EMA(half_life=f"{half_life}ba", update_interval=f"{interval}ba")
        state = SimpleNamespace(
            model=module, timestamp=Timestamp(), callbacks=[], get_elapsed_duration=lambda: Time(0, "dur")
        )
        averaged.apply(Event.INIT, state, None)

        def update() -> torch.Tensor:
            state.timestamp = state.timestamp.to_next_batch()
            if averaged.match(Event.BATCH_END, state):
                averaged.apply(Event.BATCH_END, state, None)
            return averaged.ema_model.named_parameters_dict["weight"]

        return update

    name = f"composer EMA(half_life={half_life}ba, update_interval={interval}ba)"
    return Contender(name, "mosaicml", ConstantDecay(0.5 ** (1 / half_life)), follow)


def ultralytics_average(decay: float, tau: float) -> Contender:
    def follow(module: nn.Module) -> Average:
        from ultralytics.utils.torch_utils import ModelEMA

        averaged = ModelEMA(module, decay=decay, tau=tau)
        return lambda: averaged.update(module) or averaged.ema.weight

    return Contender(f"ultralytics ModelEMA(decay={decay:g}, tau={tau:g})", "ultralytics", Ramp(decay, tau), follow)


def trl_average(alpha: float, every: int) -> Contender:
    def follow(module: nn.Module) -> Average:
        from accelerate import Accelerator
        from trl.trainer.callbacks import SyncRefModelCallback

        Accelerator(cpu=True)  # the callback asks its state for DeepSpeed
        reference = nn.Linear(module.in_features, 1, bias=False)
        reference.load_state_dict(module.state_dict())
        callback, state = SyncRefModelCallback(reference, None), SimpleNamespace(global_step=0)
        args = SimpleNamespace(ref_model_sync_steps=every, ref_model_mixup_alpha=alpha)

        def update() -> torch.Tensor:
            state.global_step += 1
            callback.on_step_end(args, state, None, model=module)
            return reference.weight

        return update

    return Contender(f"trl SyncRefModelCallback(alpha={alpha:g}, steps={every})", "trl", Sync(alpha, every), follow)


def ignite_average(momentum: float, **settings: Any) -> Contender:
    def follow(module: nn.Module) -> Average:
        from ignite.handlers import EMAHandler

        averaged = EMAHandler(module, momentum=momentum, **settings)
        engine = SimpleNamespace(state=SimpleNamespace(ema_momentum=momentum))
        return lambda: averaged._update_ema_model(engine, "ema_momentum") or averaged.ema_model.weight

    return Contender(f"ignite EMAHandler(momentum={momentum:g})", "pytorch-ignite", ConstantDecay(1 - momentum), follow)


def mmengine_average(kind: str, documented: Profile, **settings: Any) -> Contender:
    def follow(module: nn.Module) -> Average:
        import mmengine.model

        averaged = getattr(mmengine.model, kind)(module, **settings)
        return lambda: averaged.update_parameters(module) or averaged.module.weight

    cause = "updates every 10 steps with the momentum of one" if "interval" in settings else ""
    return Contender(f"mmengine {kind}({_settings(settings)[2:]})", "mmengine", documented, follow, cause)


def contenders() -> list[Contender]:
    late = Delayed(ConstantDecay(0.999), start=1)
    every = "the decay counts updates, not steps: every 10th step alone is averaged, 10 times as far back"
    return [
        ours(ConstantDecay(0.999)),
        ours(BiasCorrected(0.9999)),
        ours(PowerFunction(0.10)),
        ours(PowerFunction(0.10), every=100),
        torch_average(late, decay=0.999),
        torch_average(Uniform(), decay=None),
        timm_average("ModelEmaV2", 0.999),
        timm_average("ModelEmaV3", 0.999),
        diffusers_average(0.999),
        diffusers_average(0.9999),
        diffusers_average(0.9999, use_ema_warmup=True),
        simpletuner_average(0.9999),
        simpletuner_average(0.999, interval=10),
        torch_ema_average(0.9999),
        torch_ema_average(0.9999, use_num_updates=False),
        ema_pytorch_average(0.999),
        ema_pytorch_average(0.999, update_every=1, update_after_step=0),
        karras_average("ema-pytorch", "ema_pytorch.post_hoc_ema", 0.10),
        karras_average("ema-pytorch", "ema_pytorch.post_hoc_ema", 0.10, update_every=1),
        karras_average("pytorch-posthoc-ema", "posthoc_ema.karras_ema", 0.10),
        karras_average("pytorch-posthoc-ema", "posthoc_ema.karras_ema", 0.10, update_every=1),
        karras_average("nitrous-ema", "nitrous_ema.ema", 0.10),
        karras_average("nitrous-ema", "nitrous_ema.ema", 0.10, step_size_correction=True),
        lightning_average(Uniform()),
        lightning_average(late, decay=0.999),
        lightning_average(late, every, decay=0.999, update_every_n_steps=10),
        composer_average(1000, 1),
        composer_average(1000, 10),
        ultralytics_average(0.9999, 2000),
        trl_average(0.6, 512),
        ignite_average(0.001),
        mmengine_average("ExponentialMovingAverage", late, momentum=0.001),
        mmengine_average("ExponentialMovingAverage", late, momentum=0.001, interval=10),
        mmengine_average("StochasticWeightAverage", Uniform()),
    ]
