"""Images a second and network evaluation against diffusers' pipelines, and what scoring spends outside the network.

    python benchmarks/sampling.py [--rounds 5] [--steps 4] [--batch 64] [--device cpu] [--output benchmarks/results/sampling.json]

All variants sample from the same weights of a 9.0 M-parameter U-Net at 32×32, take turns, and are compared round by round: on
a shared machine only ratios within a round mean something. The first turn of each (compilation, allocation) does not
count. The second part times everything a scoring does at 2048 features beside the network, at `--images` images a copy, and
says which share of the whole that is at several numbers of sampling steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline
from environment import environment, save
from torch import Tensor

from ddpm_ema import config, diffusion, metrics, model, sampling
from ddpm_ema.features import Extractor
from ddpm_ema.sampling_network import SamplingNetwork
from ddpm_ema.score.feature_store import BatchStore, FeatureBatch, pixel_figures
from ddpm_ema.score.rows import RowBuilder

SIZE, CHANNELS = 32, 3
SETTINGS: dict[str, Any] = {
    "data": {"image_size": SIZE, "channels": CHANNELS},
    "model": {"block_out_channels": [64, 128, 128, 128], "attention": [False, True, False, False]},
}
VARIANTS = {
    "ours_fp32": {},
    "ours_fp32_compiled": {"compile": True},
    "ours_bf16": {"mixed_precision": "bf16"},
    "ours_bf16_compiled": {"mixed_precision": "bf16", "compile": True},
}


def settings(sampler: str, steps: int, **evaluation: Any) -> config.Config:
    return config.validate({**SETTINGS, "evaluation": {"sampler": sampler, "num_inference_steps": steps, **evaluation}})


def ours(run: config.Config, device: torch.device, batch: int, weights: dict[str, Tensor]) -> Callable[[], Any]:
    """Our sampling of one batch."""
    network = SamplingNetwork(model.build(run), run.evaluation, device, batch, None)
    network.load([weights], "bench")
    scheduler: Any = diffusion.noise_scheduler(run.diffusion)
    sampler = sampling.Sampler(scheduler.config, run.evaluation)
    shape, indices = (CHANNELS, SIZE, SIZE), torch.arange(batch)
    return lambda: sampling.sample(
        network.predict, sampler, seed=0, indices=indices, image_shape=shape, device=device
    ).cpu()


def pipeline(
    kind: str, run: config.Config, device: torch.device, batch: int, steps: int, unet: Any
) -> Callable[[], Any]:
    """diffusers' own pipeline, as its documentation calls it."""
    scheduler: Any = diffusion.noise_scheduler(run.diffusion)
    if kind == "ddpm":
        made: Any = DDPMPipeline(unet, scheduler)
    else:
        made = DDIMPipeline(unet, DDIMScheduler.from_config(scheduler.config))
    made.to(device)
    made.set_progress_bar_config(disable=True)
    return lambda: made(batch_size=batch, num_inference_steps=steps, output_type="np").images


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def speed(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Medians of images/s and network evaluation, and of each round's ratio to the pipeline of the same sampler."""
    steps, batch = arguments.steps, arguments.batch
    found: dict[str, Any] = {}
    for kind, pipe in (("ddpm", "DDPMPipeline"), ("ddim", "DDIMPipeline")):
        plain = settings(kind, steps)
        reference = SamplingNetwork(model.build(plain), plain.evaluation, torch.device("cpu"), batch, None)
        weights = {name: tensor.clone() for name, tensor in reference.unet.state_dict().items()}
        unet = reference.unet.to(device, memory_format=torch.contiguous_format)
        work = {pipe: pipeline(kind, plain, device, batch, steps, unet)}
        for name, changes in VARIANTS.items():
            work[name] = ours(settings(kind, steps, **changes), device, batch, weights)
        for function in work.values():
            seconds(function, device)
        rounds = [{name: seconds(function, device) for name, function in work.items()} for _ in range(arguments.rounds)]
        for name in work:
            rate = statistics.median(batch * steps / turn[name] for turn in rounds)
            ratios = sorted(turn[pipe] / turn[name] for turn in rounds)
            ratio, lowest, highest = statistics.median(ratios), ratios[0], ratios[-1]
            row = {"times_the_pipeline": ratio, "lowest": lowest, "highest": highest}
            found[f"{kind}/{name}"] = {"images_per_second_and_evaluation": rate, **row}
            beside = f"{ratio:5.2f} ({lowest:.2f} to {highest:.2f}) × {pipe}"
            print(f"{kind:5} {name:20} {rate:8.1f} images/s per evaluation   {beside}")
    return found


def inception(device: torch.device) -> Extractor:
    """Inception with random weights: what reading features costs does not depend on what they say."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    cls = module.FeatureExtractorInceptionV3
    with (
        mock.patch.object(module, "load_state_dict_from_url", return_value={}),
        mock.patch.object(cls, "load_state_dict", return_value=None),
    ):
        network = cls("inception-v3-compat", ["2048"], verbose=False)
    return Extractor(
        network=network,
        name="inception-v3-compat",
        sha256="random",
        feature_layer="2048",
        device=device,
        batch_size=64,
    )


def outside(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Seconds of each part of a scoring at 2048 features, and shares of the whole."""
    count, batch = arguments.images, arguments.batch
    parts: dict[str, float] = {}
    run = settings("ddpm", 8, num_images=count, compile=arguments.compile)
    network = SamplingNetwork(model.build(run), run.evaluation, device, batch, None)
    scheduler: Any = diffusion.noise_scheduler(run.diffusion)
    sampler = sampling.Sampler(scheduler.config, run.evaluation)
    x_t, t = torch.randn(batch, CHANNELS, SIZE, SIZE, device=device), torch.full((batch,), 500, device=device)
    with torch.inference_mode():
        network.predict(x_t, t, None)
        evaluation = statistics.median(seconds(lambda: network.predict(x_t, t, None), device) for _ in range(5))

    def cheap(x: Tensor, timesteps: Tensor, labels: Tensor | None) -> Tensor:
        return x

    def sample() -> Tensor:
        shape = (CHANNELS, SIZE, SIZE)
        return sampling.sample(cheap, sampler, seed=0, indices=torch.arange(batch), image_shape=shape, device=device)

    stepping = statistics.median(seconds(sample, device) for _ in range(5)) / len(sampler)
    extractor = inception(device)
    images = torch.randint(0, 256, (64, CHANNELS, SIZE, SIZE), dtype=torch.uint8)
    extractor(images)
    parts["features"] = count / 64 * statistics.median(seconds(lambda: extractor(images), device) for _ in range(3))
    parts |= metric_parts(count, run, device)
    per_step = {"network": evaluation * count / batch, "noise and sampler": stepping * count / batch}
    shares = {}
    for steps in (25, 50, 100, 250, 1000):
        beside = sum(parts.values()) + per_step["noise and sampler"] * steps
        shares[str(steps)] = beside / (beside + per_step["network"] * steps)
    for name, spent in {**{f"{k}, each step": v for k, v in per_step.items()}, **parts}.items():
        print(f"{name:28} {spent:9.3f} s for {count} images")
    for steps_text, share in shares.items():
        print(f"outside the network at {steps_text:>4} steps: {share:6.1%}")
    return {"images": count, "seconds_each_step": per_step, "seconds": parts, "share_outside_the_network": shares}


def metric_parts(count: int, run: config.Config, device: torch.device) -> dict[str, float]:
    """Features on disk, the distance with its error bars, and the other figures, on features of 10,000 reference images."""
    generator = torch.Generator().manual_seed(0)
    real = torch.rand(10_000, 2048, generator=generator)
    features = torch.rand(count, 2048, generator=generator)
    reference = metrics.with_radii(metrics.reference_of(real, {"data": "random"}), real[:256])
    saturated, contrast = pixel_figures(torch.zeros(count, CHANNELS, SIZE, SIZE, dtype=torch.uint8))
    indices = torch.arange(count)
    batch = FeatureBatch(indices=indices, features=features, saturated=saturated, contrast=contrast)
    parts = {}
    with tempfile.TemporaryDirectory() as folder:

        def store() -> BatchStore[FeatureBatch]:
            return BatchStore(Path(folder), "features", FeatureBatch)

        parts["features on disk"] = seconds(lambda: store().add(batch), torch.device("cpu"))
        parts["features on disk"] += seconds(lambda: store().join(count), torch.device("cpu"))
    builder = RowBuilder(reference, run.evaluation, device)
    builder.build(batch, "warm", {})  # with what is computed once of the reference
    parts["distance, jackknife"] = seconds(lambda: builder.estimate(batch, "weights"), device)
    whole = seconds(lambda: builder.build(batch, "weights", {}), device)
    parts["KID, precision, recall"] = whole - parts["distance, jackknife"]
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="in the second part")
    parser.add_argument("--parts", nargs="+", choices=("speed", "outside"), default=["speed", "outside"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/sampling.json"))
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    # A part that is not measured now keeps what was measured before.
    result: dict[str, Any] = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    result |= {"environment": environment("diffusers"), "device": arguments.device}
    result |= {"batch": arguments.batch, "rounds": arguments.rounds}
    if "speed" in arguments.parts:
        result["speed"] = speed(arguments, device)
    if "outside" in arguments.parts:
        result["outside"] = outside(arguments, device)
    save(arguments.output, result)


if __name__ == "__main__":
    main()
