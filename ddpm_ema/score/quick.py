"""Quick scorings while a run trains: few images, all processes, and only the rows are kept."""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ddpm_ema import capabilities
from ddpm_ema.averaging import profile_to_dict
from ddpm_ema.config import Config
from ddpm_ema.distributed import Processes
from ddpm_ema.score.driver import Driver, Job, Jobs
from ddpm_ema.score.feature_store import FeatureBatch
from ddpm_ema.score.generate import Made
from ddpm_ema.score.reference import open_references, reading_of
from ddpm_ema.score.results import metric_of
from ddpm_ema.score.rows import RowBuilder, Score, compare, ranked
from ddpm_ema.score.run import open_generator

Weights: TypeAlias = "Callable[[str], dict[str, Tensor]]"


def while_training(
    config: Config, processes: Processes, dataset: Any
) -> Callable[[int, Weights], list[dict[str, Any]]]:
    """Prepares quick scorings of raw and every average over `evaluation.every_num_images` images, the same at every step.

    They have a network of their own and touch no random generator, so training goes on bit-equal to a run that does not score.
    Only the first of `evaluation.extractors` is used. All ranks call this and the function that it returns.

    Returns:
        (completed steps, a collective that gives full fp32 CPU weights by name) -> rows as in results.json, on every rank.
    """
    capabilities.check("evaluation", config.evaluation, config.machine)
    count = config.evaluation.every_num_images
    first = config.evaluation.extractors[:1]
    settings = config.evaluation.model_copy(update={"num_images": count, "grid_images": 0, "extractors": first})
    config = config.model_copy(update={"evaluation": settings})
    generator = open_generator(config, processes, dataset)
    driver, (extractor,) = Driver(processes, generator), generator.extractors.values()

    def prepare() -> Jobs[RowBuilder]:
        references = yield from open_references(generator)
        return RowBuilder(references[extractor.key], settings, processes.device, reading_of(config) == "population")

    builder = driver.run(prepare())

    def score(name: str, step: int, weights: dict[str, Tensor]) -> Score:
        generator.load(name, None, [weights])
        batches: list[FeatureBatch] = []

        def take(made: Made) -> None:
            batches.append(made[extractor.key])

        def build() -> Score:
            assert builder is not None
            return builder.build(FeatureBatch.join(batches, torch.arange(count)), name, more)

        driver.do(Job(f"step {step} {name}", list(range(count)), (extractor.key,), take))
        profile = profile_to_dict(config.averages[name]) if name != "raw" else None
        more = {"profile": profile, "metric": metric_of(extractor), "extractor": extractor.label}
        return processes.on_main(build)

    def evaluate(step: int, weights: Weights) -> list[dict[str, Any]]:
        rows, _ = compare([score(name, step, weights(name)) for name in ("raw", *config.averages)])
        return ranked(rows)

    return evaluate
