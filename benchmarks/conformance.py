"""Measured weighting of each library's averages beside the documented one.

    python benchmarks/conformance.py [--steps 10000] [--plot FILE.png] [--output FILE.json]

After step t the parameters are the t-th unit vector, so an average of them *is* its weighting. The table has the centre of the weight
(as a share of training), the number of steps averaged, and the mean displacement of the weight (the Wasserstein distance between the
two weightings, as a share of training). Needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from diffusers.training_utils import EMAModel
from ema_pytorch import EMA
from ema_pytorch.post_hoc_ema import KarrasEMA
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ddpm_ema.averaging import AverageBank, BiasCorrected, ConstantDecay, PowerFunction, Profile, Uniform, Warmup

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Average = Callable[[], torch.Tensor]
TOLERANCE = 0.01
"""Largest mean displacement that counts as documented; updates every 100 of 10,000 steps displace by up to half of it."""


@dataclass(frozen=True)
class Contender:
    """A library, the profile that its documentation gives for some settings, and its use as documented.

    `follow(module)` returns a function to call after every step, which updates the average and returns its only tensor.
    """

    name: str
    documented: Profile
    follow: Callable[[nn.Module], Average]


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

    return Contender(f"ddpm_ema {profile!r}" + (f", every {every}" if every > 1 else ""), profile, follow)


def torch_average(documented: Profile, decay: float | None) -> Contender:
    def follow(module: nn.Module) -> Average:
        averaged = AveragedModel(module, multi_avg_fn=None if decay is None else get_ema_multi_avg_fn(decay))
        return lambda: averaged.update_parameters(module) or averaged.module.weight

    return Contender(f"torch AveragedModel, {'equal' if decay is None else f'EMA {decay:g}'}", documented, follow)


def timm_average(decay: float) -> Contender:
    def follow(module: nn.Module) -> Average:
        averaged = ModelEmaV3(module, decay=decay)
        return lambda: averaged.update(module) or averaged.module.weight

    return Contender(f"timm ModelEmaV3(decay={decay:g})", ConstantDecay(decay), follow)


def ema_pytorch_average(beta: float, **settings: Any) -> Contender:
    def follow(module: nn.Module) -> Average:
        averaged = EMA(module, beta=beta, **settings)
        return lambda: averaged.update() or averaged.ema_model.weight

    given = "".join(f", {name}={value}" for name, value in settings.items())
    documented = Warmup(beta, inv_gamma=1.0, power=2 / 3)  # "an inverse decay schedule", says its docstring
    return Contender(f"ema-pytorch EMA(beta={beta:g}{given})", documented, follow)


def karras_average(std: float, **settings: Any) -> Contender:
    def follow(module: nn.Module) -> Average:
        averaged = KarrasEMA(module, sigma_rel=std, **settings)
        return lambda: averaged.update() or averaged.ema_model.weight

    given = "".join(f", {name}={value}" for name, value in settings.items())
    return Contender(f"ema-pytorch KarrasEMA(sigma_rel={std:g}{given})", PowerFunction(std), follow)


def diffusers_average(decay: float, **settings: Any) -> Contender:
    def follow(module: nn.Module) -> Average:
        averaged = EMAModel(module.parameters(), decay=decay, **settings)
        return lambda: averaged.step(module.parameters()) or averaged.shadow_params[0]

    return Contender(f"diffusers EMAModel(decay={decay:g})", ConstantDecay(decay), follow)


def contenders() -> list[Contender]:
    return [
        ours(ConstantDecay(0.999)),
        ours(BiasCorrected(0.9999)),
        ours(PowerFunction(0.10)),
        ours(PowerFunction(0.10), every=100),
        torch_average(ConstantDecay(0.999), decay=0.999),
        torch_average(Uniform(), decay=None),
        timm_average(0.999),
        diffusers_average(0.999),
        diffusers_average(0.9999),
        ema_pytorch_average(0.999),
        ema_pytorch_average(0.999, update_every=1, update_after_step=0),
        karras_average(0.10),
        karras_average(0.10, update_every=1),
    ]


def measured_weighting(contender: Contender, steps: int) -> np.ndarray:
    """float64 [steps + 1]: weight of the initial parameters and of those after each step in the average after `steps` steps."""
    module = nn.Linear(steps + 1, 1, bias=False)
    with torch.no_grad():
        module.weight.zero_()
        module.weight[0, 0] = 1.0
        update = contender.follow(module)
        average = module.weight
        for step in range(1, steps + 1):
            module.weight[0, step - 1] = 0.0
            module.weight[0, step] = 1.0
            average = update()
    return average.detach().double().numpy().ravel()


def documented_weighting(contender: Contender, steps: int) -> np.ndarray:
    profile = contender.documented
    return np.concatenate([[profile.initial_weight(steps)], profile.weighting(steps)])


def judge(contender: Contender, steps: int) -> dict[str, Any]:
    measured, documented = measured_weighting(contender, steps), documented_weighting(contender, steps)
    times = np.arange(steps + 1) / steps
    displacement = float(np.abs(np.cumsum(measured) - np.cumsum(documented)).sum() / steps)
    return {
        "name": contender.name,
        "documented": repr(contender.documented),
        "centre_documented": float(documented @ times),
        "centre_measured": float(measured @ times),
        "steps_averaged_documented": float(1 / (documented @ documented)),
        "steps_averaged_measured": float(1 / (measured @ measured)),
        "displacement": displacement,
        "as_documented": displacement <= TOLERANCE,
        "cumulative": np.cumsum(measured)[:: max(1, steps // 500)].tolist(),
        "cumulative_documented": np.cumsum(documented)[:: max(1, steps // 500)].tolist(),
    }


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    columns = 5
    figure, axes = plt.subplots(-(-len(rows) // columns), columns, figsize=(17, 7.5), sharex=True, sharey=True)
    for axis, row in zip(axes.flat, rows, strict=False):
        times = np.linspace(0, 1, len(row["cumulative"]))
        axis.plot(times, row["cumulative_documented"], color="0.6", linewidth=4, label="documented")
        axis.plot(times, row["cumulative"], color="C0" if row["as_documented"] else "C3", label="measured")
        axis.set_title(f"{row['name']}\ndisplaced by {row['displacement']:.1%} of training", fontsize=7)
    for axis in axes.flat[len(rows) :]:
        axis.set_visible(False)
    axes.flat[0].legend(fontsize=8)
    figure.supxlabel("time, as a share of training")
    figure.supylabel("weight given to the parameters until then")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000, help="optimizer steps to average over")
    parser.add_argument("--plot", type=Path, default=here.parent / "docs" / "images" / "averaging_conformance.png")
    parser.add_argument("--device", default="cpu", help="only cpu: a weighting does not depend on it", choices=["cpu"])
    parser.add_argument("--output", type=Path, default=here / "results" / "conformance.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [judge(contender, arguments.steps) for contender in contenders()]
    print(
        f"{arguments.steps} steps{'':42s}  centre: documented  measured   steps averaged: documented  measured   displaced by"
    )
    for row in rows:
        mark = "  " if row["as_documented"] else "!!"
        print(
            f"{mark} {row['name']:60s} {row['centre_documented']:8.3f} {row['centre_measured']:9.3f}"
            f" {row['steps_averaged_documented']:21.0f} {row['steps_averaged_measured']:9.0f} {row['displacement']:16.1%}"
        )
    plot(rows, arguments.plot)
    packages = ("torch", "diffusers", "timm", "ema-pytorch")
    versions = {package: importlib.metadata.version(package) for package in packages}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    curves = ("cumulative", "cumulative_documented")
    kept = [{key: value for key, value in row.items() if key not in curves} for row in rows]
    arguments.output.write_text(
        json.dumps({"steps": arguments.steps, "versions": versions, "rows": kept}, indent=2) + "\n"
    )
    print(f"written to {arguments.output} and {arguments.plot}")


if __name__ == "__main__":
    main()
