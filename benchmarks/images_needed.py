"""How many images are enough: distances, errors and paired differences over N, and bf16 against fp32 sampling, on a real run.

    python benchmarks/images_needed.py --config configs/digits.yaml [--output-dir runs/digits] [--evaluation.weights raw power_0_10]
        [--evaluation.num-images 6000] [--bench.output benchmarks/results/images_needed.json]

Samples `evaluation.num_images` images of each copy once (raw and every average unless `evaluation.weights` names some), and
compares the first N of them, N from 300 up. The last copy is sampled in bf16, too: same noise, so the difference is paired.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from environment import environment, save

from ddpm_ema import cli, config, metrics
from ddpm_ema.distributed import Processes
from ddpm_ema.named_weights import WeightResolver
from ddpm_ema.rundir import RunDir
from ddpm_ema.score.driver import Driver, Job, Jobs
from ddpm_ema.score.feature_store import FeatureBatch
from ddpm_ema.score.generate import Made
from ddpm_ema.score.reference import open_references
from ddpm_ema.score.rows import RowBuilder
from ddpm_ema.score.run import open_generator

SIZES = (300, 500, 1000, 1500, 2000, 3000, 5000, 6000, 10_000, 20_000, 50_000)


def sample(run: config.Config, processes: Processes, name: str) -> FeatureBatch:
    """Features of every image of one set of weights."""
    generator, rundir = open_generator(run, processes), RunDir(run.output_dir)
    weights = WeightResolver(rundir, rundir.newest_whole()[0], run).named(name)
    generator.load(name, weights.pipeline, [read() for read in weights.members])
    images, batches = list(range(run.evaluation.num_images)), list[FeatureBatch]()
    extractor = next(iter(generator.extractors))

    def take(made: Made) -> None:
        batches.append(made[extractor])

    Driver(processes, generator).do(Job(f"{name} {run.evaluation.mixed_precision}", images, (extractor,), take))
    return FeatureBatch.join(batches, torch.tensor(images))


def row_builder(run: config.Config, processes: Processes) -> RowBuilder:
    generator = open_generator(run, processes)

    def jobs() -> Jobs[RowBuilder]:
        references = yield from open_references(generator)
        return RowBuilder(next(iter(references.values())), run.evaluation, processes.device)

    found = Driver(processes, generator).run(jobs())
    assert found is not None
    return found


def curve(builder: RowBuilder, batches: dict[str, FeatureBatch], sizes: list[int]) -> list[dict[str, Any]]:
    """One row for each N."""
    rows = []
    for size in sizes:
        estimates = {
            name: builder.estimate(FeatureBatch.join([batch], torch.arange(size)), name)
            for name, batch in batches.items()
        }
        row: dict[str, Any] = {"images": size, "copies": {}, "differences": {}}
        for name, found in estimates.items():
            row["copies"][name] = {"plain": found.plain, "corrected": found.unbiased, "stderr": found.stderr}
        pairs = [(first, second) for first, second in pairwise(estimates)] + [
            (next(iter(estimates)), list(estimates)[-1])
        ]
        for a, b in dict.fromkeys(pairs):
            d = metrics.difference(estimates[a], estimates[b])
            unpaired = (estimates[a].stderr ** 2 + estimates[b].stderr ** 2) ** 0.5
            row["differences"][f"{a} − {b}"] = {
                "delta": d.unbiased,
                "stderr": d.stderr,
                "unpaired": unpaired,
                "significant": d.p_value <= metrics.ALPHA,
            }
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        copies = "  ".join(
            f"{name}: {c['plain']:.2f} / {c['corrected']:.2f} ± {c['stderr']:.2f}" for name, c in row["copies"].items()
        )
        differences = "  ".join(
            f"{name}: {d['delta']:.2f} ± {d['stderr']:.2f} ({d['unpaired']:.2f}){'' if d['significant'] else ' not significant'}"
            for name, d in row["differences"].items()
        )
        print(f"N = {row['images']}\n  {copies}\n  {differences}")


def bench(run: config.Config, output: Path) -> None:
    here, processes = environment("diffusers"), Processes.start(run.machine.device)
    builder = row_builder(run, processes)
    names = list(run.evaluation.weights or ("raw", *run.averages))
    batches = {name: sample(run, processes, name) for name in names}
    count = run.evaluation.num_images
    rows = curve(builder, batches, sorted({size for size in SIZES if size < count} | {count}))
    show(rows)
    bf16 = run.model_copy(update={"evaluation": run.evaluation.model_copy(update={"mixed_precision": "bf16"})})
    in_bf16 = sample(bf16, processes, names[-1])
    precision = curve(builder, {f"{names[-1]} in bf16": in_bf16, f"{names[-1]} in fp32": batches[names[-1]]}, [count])
    show(precision)
    settings = config.to_dict(run)["evaluation"]
    found = {"settings": settings, "curve": rows, "bf16": precision[0]}
    save(output, {"environment": here, **found})


def main(arguments: list[str]) -> int:
    output = Path("benchmarks/results/images_needed.json")
    if "--bench.output" in arguments:
        place = arguments.index("--bench.output")
        output = Path(arguments[place + 1])
        arguments = arguments[:place] + arguments[place + 2 :]
    return cli.guard(lambda: bench(config.parse(arguments), output))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
