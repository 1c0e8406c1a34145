"""Where each millisecond of a training step goes, and ours against plain loops with diffusers' EMAModel, in one run.

    python benchmarks/train_step.py [--rounds 7] [--steps 4] [--device cpu] [--output benchmarks/results/train_step.json]

All variants train the same 9.0 M-parameter U-Net (32×32, batch 16) on the same random images, take turns (a few steps each,
several rounds), and are compared round by round: on a shared machine only ratios within a round mean something. The first
turn of each variant (compilation, allocation) does not count.

    bare        eager fp32 forward, backward, clip, fused AdamW; nothing else: the yardstick
    script      what diffusers' train_unconditional.py does: bare, random noise, and one EMAModel
    three       bare, random noise, and three diffusers EMAModels (foreach): the usual way to keep several averages
    ours_fp32   this trainer, fp32, not compiled, four averages
    ours        this trainer, bf16, compiled, channels-last, four averages
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel
from environment import environment, save
from torch.nn import functional

from ddpm_ema import batch_order, config, model, network_call, train
from ddpm_ema.distributed import Processes
from ddpm_ema.rundir import RunDir
from ddpm_ema.train import step as step_module
from ddpm_ema.train.trainer import MicroBatch

BATCH, SIZE = 16, 32
AVERAGES = {
    "ema_0_999": {"kind": "constant", "decay": 0.999},
    "ema_0_9999": {"kind": "constant", "decay": 0.9999},
    "power_0_05": {"kind": "power_function", "std": 0.05},
    "power_0_10": {"kind": "power_function", "std": 0.10},
}


def settings(folder: Path, device: str, **training: Any) -> config.Config:
    return config.validate(
        {
            "output_dir": str(folder),
            "data": {"source": "digits", "image_size": SIZE, "channels": 3},
            "model": {
                "block_out_channels": [64, 128, 128, 128],
                "attention": [False, True, False, False],
                "layers_per_block": 2,
            },
            "training": {"batch_size": BATCH, "steps": 10**6, **training},
            "machine": {"device": device},
            "averages": AVERAGES,
        }
    )


class Peer:
    """A plain training loop over the same network."""

    def __init__(self, run: config.Config, device: torch.device, num_averages: int, with_noise: bool) -> None:
        self.network = model.build(run).to(device)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), 1e-4, betas=(0.95, 0.999), weight_decay=1e-6)
        self.scheduler = DDPMScheduler(num_train_timesteps=1000)
        self.averages = [EMAModel(self.network.parameters(), foreach=True) for _ in range(num_averages)]
        self.images = torch.rand(BATCH, 3, SIZE, SIZE, device=device) * 2 - 1
        self.noise = None if with_noise else torch.randn_like(self.images)
        self.device = device

    def __call__(self) -> None:
        noise = torch.randn_like(self.images) if self.noise is None else self.noise
        timesteps = torch.randint(0, 1000, (BATCH,), device=self.device)
        noisy = self.scheduler.add_noise(self.images, noise, timesteps)
        loss = functional.mse_loss(self.network(noisy, timesteps).sample, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for average in self.averages:
            average.step(self.network.parameters())


class Ours:
    """This trainer, step by step."""

    def __init__(self, run: config.Config, processes: Processes) -> None:
        self.trainer = train.build(run, processes, RunDir(run.output_dir))
        self.positions = torch.arange(BATCH)

    def __call__(self) -> None:
        indices = batch_order.batch_indices(0, self.trainer.step, self.positions, BATCH, len(self.trainer.dataset))
        micro_batch = MicroBatch(self.positions, indices, self.trainer.dataset.batch(indices))
        train.train_step(self.trainer, [micro_batch])
        step_module.read_checks(self.trainer, lag=0)


def seconds(work: Callable[[], None], steps: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps


def breakdown(ours: Ours, steps: int, device: torch.device) -> dict[str, float]:
    """Milliseconds a step by part, on the trainer's own functions; each part waits for the device, so sums run a little high."""
    spent: dict[str, float] = defaultdict(float)
    trainer = ours.trainer

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            result = function(*args, **kwargs)
            if device.type == "cuda":
                torch.cuda.synchronize()
            spent[name] += time.perf_counter() - start
            return result

        return wrapper

    patches = [
        (network_call, "predict", "forward"),
        (trainer.objective, "inputs", "images to floats, noise and timesteps"),
        (step_module, "_clip", "gradient norm and clipping"),
        (torch.Tensor, "backward", "backward"),
        (trainer.optimizer, "step", "optimizer"),
        (trainer.bank, "update", "averages"),
        (trainer.dataset, "batch", "images"),
    ]
    saved = [(target, name, getattr(target, name)) for target, name, _ in patches]
    try:
        for target, name, label in patches:
            setattr(target, name, timed(label, getattr(target, name)))
        total = seconds(ours, steps, device)
    finally:
        for target, name, original in saved:
            setattr(target, name, original)
    parts = {name: 1000 * value / steps for name, value in spent.items()}
    parts["everything else"] = 1000 * total - sum(parts.values())
    parts["total"] = 1000 * total
    return parts


def share_outside(parts: dict[str, float]) -> float:
    """Share of the step that is not forward, backward or optimizer (which includes clipping, as in every loop)."""
    core = ("forward", "backward", "optimizer", "gradient norm and clipping")
    return 1 - sum(parts[name] for name in core) / parts["total"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/train_step.json"))
    arguments = parser.parse_args()
    processes = Processes.start(arguments.device)
    device, here = processes.device, environment("diffusers")
    with tempfile.TemporaryDirectory() as folder:
        plain = settings(Path(folder) / "fp32", arguments.device)
        fast = settings(Path(folder) / "fast", arguments.device, mixed_precision="bf16", compile=True)
        variants: dict[str, Callable[[], None]] = {
            "bare": Peer(plain, device, 0, with_noise=False),
            "script": Peer(plain, device, 1, with_noise=True),
            "three": Peer(plain, device, 3, with_noise=True),
            "ours_fp32": Ours(plain, processes),
            "ours": Ours(fast, processes),
        }
        for work in variants.values():
            seconds(work, 2, device)
        times: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(arguments.rounds):
            for name, work in variants.items():
                times[name].append(seconds(work, arguments.steps, device))
        ours = variants["ours"]
        assert isinstance(ours, Ours)
        parts = breakdown(ours, arguments.steps * arguments.rounds, device)
    save(arguments.output, {"environment": here, **report(arguments, times, parts, device)})


def report(
    arguments: argparse.Namespace, times: dict[str, list[float]], parts: dict[str, float], device: torch.device
) -> dict[str, Any]:
    ratios = {
        name: sorted(bare / own for bare, own in zip(times["bare"], values, strict=True))
        for name, values in times.items()
    }
    speedup = {name: statistics.median(found) for name, found in ratios.items()}
    result = {
        "batch": BATCH,
        "images_per_second": {name: BATCH / statistics.median(values) for name, values in times.items()},
        "speed_relative_to_bare": speedup,
        "lowest_and_highest_round": {name: [found[0], found[-1]] for name, found in ratios.items()},
        "milliseconds_of_ours": parts,
        "share_outside_forward_backward_optimizer": share_outside(parts),
        "rounds": arguments.rounds,
        "steps_a_turn": arguments.steps,
        "device": device.type,
    }
    print(f"{'variant':12} {'images/s':>9} {'against bare':>13}")
    for name in times:
        rate, spread = BATCH / statistics.median(times[name]), f"{ratios[name][0]:.2f} to {ratios[name][-1]:.2f}"
        print(f"{name:12} {rate:9.1f} {speedup[name]:12.2f}x ({spread})")
    print("\na step of ours, in milliseconds")
    for name, value in parts.items():
        print(f"  {name:28} {value:8.2f}  {100 * value / parts['total']:5.1f}%")
    print(f"outside forward, backward and optimizer: {100 * share_outside(parts):.1f}%")
    return result


if __name__ == "__main__":
    main()
