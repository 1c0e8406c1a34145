"""`run`: from settings to results.json, grid and table, for every checkpoint asked for."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch

from ddpm_ema import capabilities, data
from ddpm_ema.config import Config, digest
from ddpm_ema.distributed import Processes, StopFlag
from ddpm_ema.features import open_extractor
from ddpm_ema.messages import logger
from ddpm_ema.metrics import Reference
from ddpm_ema.named_weights import WeightResolver
from ddpm_ema.numbers import listed
from ddpm_ema.own_statistics import with_own_statistics
from ddpm_ema.rundir import Checkpoint, RunDir
from ddpm_ema.score.checkpoints import checkpoints
from ddpm_ema.score.driver import Driver, Jobs, even_batch
from ddpm_ema.score.folder import ScoreFolder
from ddpm_ema.score.generate import Generator
from ddpm_ema.score.reference import open_reference, reference_split
from ddpm_ema.score.results import heading, settings_of, table
from ddpm_ema.score.scorer import Scorer
from ddpm_ema.score.sweep import Sweep, candidates, describe, summary
from ddpm_ema.score.versions import check_versions


def run(config: Config) -> list[dict[str, Any]]:
    """Scores the weights that `evaluation` names, and goes on with what earlier starts finished.

    Returns:
        What results.json says, one entry per checkpoint; nothing on ranks other than 0.

    Raises:
        UserError: settings, weights or files that cannot be scored.
        StoppedError: after a signal.
    """
    capabilities.check("evaluation", config.evaluation, config.machine)
    candidates(config.evaluation.sweep)  # an impossible range is an error before anything is read
    processes = Processes.start(config.machine.device, timeout=config.machine.timeout)
    with StopFlag() as stop, processes.telling_peers(), processes.naming_lost_ranks("scoring"):
        found = processes.on_main(lambda: checkpoints(config), "reading checkpoints")
        generator = open_generator(config, processes)
        results: list[dict[str, Any]] = []
        jobs = _score_all(config, generator, found, processes.world_size, results)
        Driver(processes, generator, stop).run(jobs)
    processes.close()
    return results


def open_generator(config: Config, processes: Processes, trained: Any = None) -> Generator:
    """Extractor and data, on every rank; the others find what rank 0 left in the cache.

    `trained` is the data set that was trained on, where it is loaded already.
    """
    evaluation, split = config.evaluation, reference_split(config)
    extractor = processes.main_first(lambda: open_extractor(evaluation, config.output_dir, processes.device))
    if trained is None and (config.model.class_conditional or split == config.data.split):
        trained = load_split(config, processes, config.data.split)
    compared = trained
    if split is not None and split != config.data.split:
        compared = load_split(config, processes, split)
    batch_size = even_batch(evaluation.num_images, processes.world_size, evaluation.batch_size)
    return Generator(config, extractor, batch_size, trained, compared)


def load_split(config: Config, processes: Processes, split: str) -> Any:
    return processes.main_first(lambda: data.load(config.data, split=split))


def _score_all(
    config: Config, generator: Generator, found: list[Checkpoint | None], world_size: int, results: list[dict[str, Any]]
) -> Jobs[None]:
    """What rank 0 does; it adds to `results`."""
    reference = yield from open_reference(config, generator)
    logger.info(_description(config, generator, reference, world_size))
    for checkpoint in found:
        results.append((yield from _score(config, generator, reference, checkpoint, world_size)))


def _score(
    config: Config, generator: Generator, reference: Reference, checkpoint: Checkpoint | None, world_size: int
) -> Jobs[dict[str, Any]]:
    """Scores one checkpoint (None: weights that need none); returns its results."""
    rundir, step = RunDir(config.output_dir), checkpoint.step if checkpoint is not None else 0
    origin = {**reference.origin, "size": reference.statistics.count}
    settings = settings_of(config, generator.extractor, origin, generator.known_labels)
    path = RunDir(config.evaluation.output or rundir.path).score_dir(step, digest(settings))
    settle = partial(with_own_statistics, config=config, device=generator.extractor.device)
    resolver = WeightResolver(rundir, checkpoint, config, generator.num_classes, lambda: generator.own_pipeline, settle)
    with RunDir(path).lock():
        scorer = Scorer(config, generator, reference, resolver, ScoreFolder(path), settings, world_size)
        wanted = scorer.named()  # all names first: a wrong one is an error at once
        sweeps = [Sweep(scorer, of_kind) for of_kind in candidates(config.evaluation.sweep, step).values()]
        yield from check_versions(scorer)
        start, complete = time.perf_counter(), scorer.is_complete(wanted)
        spent: dict[str, Any] = {}
        for weights in [] if complete else wanted:
            yield from scorer.score(weights)
        for sweep in sweeps:
            spent |= yield from sweep.jobs(config.evaluation.sweep.search)
        results = scorer.write(summary(scorer, spent))
    head = "already complete" if complete and not sweeps else f"done in {time.perf_counter() - start:.0f} s"
    logger.info(f"\n{path / 'results.json'}: {head}")
    _show(results)
    return results


def _show(results: dict[str, Any]) -> None:
    logger.info(heading(results))
    logger.info(table(results))
    if results.get("sweep"):
        logger.info(f"\n{table(results, results['sweep'])}\n{describe(results)}")
    for warning in results["warnings"]:
        names = [row["weights"] for row in results["rows"] if warning in row["warnings"]]
        logger.warning((f"{listed(names)}: " if 0 < len(names) < len(results["rows"]) else "") + warning)


def _description(config: Config, generator: Generator, reference: Reference, world_size: int) -> str:
    """What a person should see before the first image."""
    evaluation, extractor = config.evaluation, generator.extractor
    precision = {"no": "fp32"}.get(evaluation.mixed_precision, evaluation.mixed_precision)
    threads = f", {torch.get_num_threads()} threads" if extractor.device.type == "cpu" else ""
    lines = [
        f"device       {extractor.device}{threads}, {precision}{', compiled' if evaluation.compile else ''}",
        f"processes    {world_size}",
        f"features     {extractor.name}, {extractor.dim} of {extractor.feature_layer}",
        f"reference    {evaluation.reference}, {reference.statistics.count} images",
    ]
    return "\n".join(lines)
