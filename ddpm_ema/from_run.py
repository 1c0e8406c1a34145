"""`ddpm_ema.load` and `ddpm_ema.sample`: the weights of a run in a program of one's own."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_ema import config as settings
from ddpm_ema import data, diffusion, model, sampling
from ddpm_ema.config import Config
from ddpm_ema.errors import UserError
from ddpm_ema.named_weights import NamedWeights, WeightResolver, build_scheduler, build_unet, trained_settings
from ddpm_ema.own_statistics import with_own_statistics
from ddpm_ema.rundir import RunDir
from ddpm_ema.sampling_network import SamplingNetwork
from ddpm_ema.weight_names import WeightName


@dataclass(frozen=True)
class Loaded:
    """Weights of a run, in a network that is ready to predict.

    Attributes:
        network: (x_t, timesteps, labels) -> prediction, in evaluation mode, without gradients: a diffusers `UNet2DModel`, or what the
            run's `model.factory` makes. Of an ensemble it has the weights of the first member.
        scheduler: the diffusers DDPMScheduler with the noise levels of training.
        config: the settings of the run.
        weights: their name, step, profile and warnings.
    """

    network: nn.Module
    scheduler: Any
    config: Config
    weights: NamedWeights


def load(
    run: Path | str,
    name: str = "raw",
    *,
    step: int | None = None,
    device: torch.device | str = "cpu",
    factory: str | None = None,
) -> Loaded:
    """The weights `name` of a run.

    Args:
        run: the run directory.
        name: raw, an average, a profile to reconstruct (power_0_075), NAME@STEP, or A+B.
        step: completed optimizer steps; None means those of the newest whole checkpoint.
        device: that the network is put on.
        factory: the run's `model.factory`, if it has one and you trust that code.

    Raises:
        UserError: no such run, name or step; a damaged file; a factory that was not repeated.
    """
    rundir = RunDir(run)
    checkpoint = rundir.newest_usable()
    config = trained_settings(rundir, checkpoint, factory)

    resolver = WeightResolver(rundir, checkpoint, config, settle=partial(with_own_statistics, config=config))
    weights = resolver.named(name if "@" in name else str(WeightName(name, step)))
    if step is not None and weights.step != step:
        raise UserError(f"{name}: --step is {step}; give one step, as NAME@STEP or with --step")
    tensors, pipeline = weights.members[0](), weights.pipeline
    if pipeline is None:
        where = f"{rundir.path}: weights {weights.name!r} of step {weights.step}"
        network = model.fitting(config, tensors, where, lambda: data.load(config.data).num_classes)
    else:
        network = build_unet(pipeline.unet)
    network.load_state_dict(tensors)
    schedule = pipeline.schedule if pipeline is not None else None
    scheduler = diffusion.noise_scheduler(config.diffusion) if schedule is None else build_scheduler(schedule)
    return Loaded(network.eval().requires_grad_(False).to(device), scheduler, config, weights)


def sample(
    loaded: Loaded, count: int, *, seed: int | None = None, labels: Tensor | None = None, **evaluation: Any
) -> Tensor:
    """The first `count` images that scoring samples with these weights; another batch size changes them by rounding at most.

    Args:
        loaded: of `load`.
        count: number of images.
        seed: of the noise; None means the run's `evaluation.seed`.
        labels: int64 `[count]` for a class-conditional network; None draws them as scoring does, as often as in the data set.
        **evaluation: settings of that section in place of the run's, such as sampler="ddim", num_inference_steps=50.

    Returns:
        uint8 `[count, C, H, W]` on the network's device.

    Raises:
        UserError: a bad setting.
    """
    config, network = loaded.config, loaded.network
    chosen = config.evaluation.model_dump() | evaluation | ({} if seed is None else {"seed": seed})
    used = settings.validate(settings.to_dict(config) | {"evaluation": chosen}, "ddpm_ema.sample").evaluation
    device, no_label = next(network.parameters()).device, model.no_label(network)
    ready = SamplingNetwork(network, used, device, used.batch_size, no_label)
    if len(loaded.weights.members) > 1:
        ready.load([read() for read in loaded.weights.members], loaded.weights.name)
    if no_label is not None and labels is None:
        known = data.load(config.data).labels
        assert known is not None  # `model.build` has refused classes without labels
        labels = sampling.labels_for(used.seed, torch.arange(count), known)
    sampler = sampling.Sampler(loaded.scheduler.config, used)
    shape = (config.data.channels, config.data.image_size, config.data.image_size)
    same: dict[str, Any] = {"seed": used.seed, "image_shape": shape, "device": device}
    made = []
    for batch in torch.arange(count).split(used.batch_size):
        own = None if labels is None else labels[batch]
        made.append(sampling.sample(ready.predict, sampler, indices=batch, labels=own, **same))
    return torch.cat(made)
