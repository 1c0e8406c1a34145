"""Measured weighting of averages beside the documented one: of every library that is installed, or of your own averager.

    python benchmarks/conformance.py [--steps 10000] [--plot FILE.png] [--output FILE.json]
    python benchmarks/conformance.py my_package.ema:make_average --documented '{kind: constant, decay: 0.999}'

`make_average(module)` returns a function that is called after every step, updates the average, and returns its tensor, or a module
with it. After step t the parameters are the t-th unit vector, so an average of them *is* its weighting. The table has the centre of
the weight (as a share of training), the number of steps averaged, and the mean displacement of the weight (the Wasserstein distance
between the two weightings, as a share of training). benchmarks/averagers.py has the libraries.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import yaml
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from averagers import Contender, contenders

from ddpm_ema.averaging import profile_from_dict

matplotlib.use("Agg")
from environment import environment, save
from matplotlib import pyplot as plt

TOLERANCE = 0.01
"""Largest mean displacement that counts as documented; updates every 100 of 10,000 steps displace by up to half of it."""


def own_contender(factory: str, documented: dict[str, Any]) -> Contender:
    """An averager of the user's: "module:function" and its documented profile, as in YAML."""
    module, _, name = factory.partition(":")
    sys.path.insert(0, "")
    follow = getattr(importlib.import_module(module), name)
    return Contender(factory, module.partition(".")[0], profile_from_dict(documented), follow)


def tensor_of(found: Any) -> torch.Tensor:
    return found if isinstance(found, torch.Tensor) else next(iter(found.parameters()))


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
    return tensor_of(average).detach().double().numpy().ravel()


def documented_weighting(contender: Contender, steps: int) -> np.ndarray:
    profile = contender.documented
    return np.concatenate([[profile.initial_weight(steps)], profile.weighting(steps)])


def judge(contender: Contender, steps: int) -> dict[str, Any]:
    measured, documented = measured_weighting(contender, steps), documented_weighting(contender, steps)
    times = np.arange(steps + 1) / steps
    displacement = float(np.abs(np.cumsum(measured) - np.cumsum(documented)).sum() / steps)
    return {
        "name": contender.name,
        "package": contender.package,
        "documented": repr(contender.documented),
        "centre_documented": float(documented @ times),
        "centre_measured": float(measured @ times),
        "steps_averaged_documented": float(1 / (documented @ documented)),
        "steps_averaged_measured": float(1 / (measured @ measured)),
        "displacement": displacement,
        "as_documented": displacement <= TOLERANCE,
        "cause": "" if displacement <= TOLERANCE else contender.cause,
        "cumulative": np.cumsum(measured)[:: max(1, steps // 500)].tolist(),
        "cumulative_documented": np.cumsum(documented)[:: max(1, steps // 500)].tolist(),
    }


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    columns = min(6, len(rows))
    lines = -(-len(rows) // columns)
    size = (3.0 * columns, 2.2 * lines + 0.7)
    figure, axes = plt.subplots(
        lines, columns, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for axis, row in zip(axes.flat, rows, strict=False):
        times = np.linspace(0, 1, len(row["cumulative"]))
        axis.plot(times, row["cumulative_documented"], color="0.6", linewidth=4, label="documented")
        axis.plot(times, row["cumulative"], color="C0" if row["as_documented"] else "C3", label="measured")
        name = row["name"].replace("(", "\n(", 1)
        axis.set_title(f"{name}\ndisplaced by {row['displacement']:.1%} of training", fontsize=6.5)
    for axis in axes.flat[len(rows) :]:
        axis.set_visible(False)
    axes.flat[0].legend(fontsize=8)
    figure.supxlabel("time, as a share of training")
    figure.supylabel("weight given to the parameters until then")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90, metadata={"Software": None})
    plt.close(figure)


def installed(packages: set[str]) -> list[str]:
    """Those that are distributions, and no module of one's own."""
    return sorted(packages & {found.name for found in importlib.metadata.distributions()})


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "factory", nargs="?", help="MODULE:FUNCTION of an averager of your own, in place of the libraries"
    )
    parser.add_argument("--documented", type=yaml.safe_load, help="its documented profile, as in YAML")
    parser.add_argument("--steps", type=int, default=10_000, help="optimizer steps to average over")
    parser.add_argument("--plot", type=Path, help="picture to write (default: the one in the docs; none for your own)")
    parser.add_argument("--output", type=Path, help="results to write (default: benchmarks/results; none for your own)")
    arguments = parser.parse_args()
    if arguments.factory and not arguments.documented:
        parser.error(
            "--documented: give the profile that the averager claims, such as '{kind: constant, decay: 0.999}'"
        )
    own = [own_contender(arguments.factory, arguments.documented)] if arguments.factory else []
    torch.set_num_threads(1)
    wanted = own or contenders()
    where = environment(*installed({contender.package for contender in wanted}))
    rows, missing = [], {}
    columns = "centre: documented  measured   steps averaged: documented  measured   displaced by"
    print(f"{arguments.steps} steps{'':52s}  {columns}")
    for contender in wanted:
        try:
            row = judge(contender, arguments.steps)
        except ImportError as error:
            missing[contender.package] = f"not installed: {error}"
            continue
        rows.append(row)
        mark = "  " if row["as_documented"] else "!!"
        print(
            f"{mark} {row['name']:70s} {row['centre_documented']:8.3f} {row['centre_measured']:9.3f}"
            f" {row['steps_averaged_documented']:21.0f} {row['steps_averaged_measured']:9.0f} {row['displacement']:16.1%}",
            flush=True,
        )
    for package, reason in missing.items():
        print(f"   {package}: {reason}")
    picture = arguments.plot or (None if own else here.parent / "docs" / "images" / "averaging_conformance.png")
    results = arguments.output or (None if own else here / "results" / "conformance.json")
    if picture:
        plot(rows, picture)
        print(f"drawn in {picture}")
    if results:
        curves = ("cumulative", "cumulative_documented")
        kept = [{key: value for key, value in row.items() if key not in curves} for row in rows]
        save(results, {"environment": where, "steps": arguments.steps, "missing": missing, "rows": kept})
        print(f"written to {results}")


if __name__ == "__main__":
    main()
