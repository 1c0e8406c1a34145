"""Quick scorings while a run trains: the same code over few images, all processes, nothing kept but the rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor

from ddpm_ema import capabilities
from ddpm_ema.averaging import profile_to_dict
from ddpm_ema.config import Config
from ddpm_ema.distributed import Processes
from ddpm_ema.features import open_extractor
from ddpm_ema.score.blocks import Block, MemoryStore
from ddpm_ema.score.measure import Measure, Score, rows
from ddpm_ema.score.reference import is_file, load_split, open_reference, reference_split
from ddpm_ema.score.results import metric_of
from ddpm_ema.score.studio import Studio
from ddpm_ema.score.together import only_on_main

Weights: TypeAlias = "Callable[[str], dict[str, Tensor]]"


def while_training(
    config: Config, processes: Processes, dataset: Any
) -> Callable[[int, Weights], list[dict[str, Any]]]:
    """Built once; then `rows = evaluator(step, weights)` on every rank, `weights(name)` being a collective.

    Scores raw and every average over `evaluation.every_num_images` images, the same ones at every step. It has a network of
    its own and touches no random generator, so training goes on bit-equal to a run that does not score.
    """
    capabilities.check("evaluation", config.evaluation, config.machine)
    count = config.evaluation.every_num_images
    settings = config.evaluation.model_copy(update={"num_images": count, "grid_images": 0})
    config = config.model_copy(update={"evaluation": settings})
    extractor = processes.main_first(lambda: open_extractor(settings, config.output_dir, processes.device))
    split = None if is_file(config) else reference_split(config)
    compared = dataset if split in (None, config.data.split) else load_split(config, processes, str(split))
    reference, _ = open_reference(config, processes, extractor, None if split is None else compared)
    studio = Studio.build(
        config,
        processes,
        extractor,
        num_images=count,
        num_classes=dataset.num_classes,
        known_labels=dataset.labels if config.model.class_conditional else None,
    )
    studio.prepare()
    measure = Measure(reference, settings, processes.device) if reference is not None else None
    names = ["raw", *config.averages]

    def score(name: str, step: int, weights: dict[str, Tensor]) -> Score | None:
        store = MemoryStore()
        studio.network.load([weights], name)
        studio.extend(f"step {step} {name}", store, count)
        profile = profile_to_dict(config.averages[name]) if name != "raw" else None
        more = {"profile": profile, "metric": metric_of(extractor), "extractor": extractor.name}
        return only_on_main(processes, lambda: _measured(measure, store.block(count), name, more))

    def evaluate(step: int, weights: Weights) -> list[dict[str, Any]]:
        scores = [score(name, step, weights(name)) for name in names]
        known = [found for found in scores if found is not None]
        return processes.broadcast(rows(known))

    return evaluate


def _measured(measure: Measure | None, block: Block, name: str, more: dict[str, Any]) -> Score:
    assert measure is not None
    return measure.score(block, name, more)
