"""`run`: from settings to results.json, grid and table, for every checkpoint asked for."""

from __future__ import annotations

import time
from typing import Any

import torch
from tqdm import tqdm

from ddpm_ema import capabilities
from ddpm_ema.config import Config, Effect, differing, to_dict
from ddpm_ema.distributed import Processes, StopFlag
from ddpm_ema.errors import UserError
from ddpm_ema.features import open_extractor
from ddpm_ema.messages import logger
from ddpm_ema.named_weights import NamedWeights
from ddpm_ema.rundir import Checkpoint
from ddpm_ema.score.reference import is_file, load_split, open_reference, reference_split
from ddpm_ema.score.results import heading, table
from ddpm_ema.score.scoring import Scoring, checkpoints
from ddpm_ema.score.studio import Studio
from ddpm_ema.score.sweep import candidates, describe, prepare, sweep
from ddpm_ema.score.together import on_main, only_on_main
from ddpm_ema.score.versions import check_versions


def run(config: Config) -> list[dict[str, Any]]:
    """Scores the weights that `evaluation` names; returns what results.json says, one entry a checkpoint ([] but on rank 0).

    Goes on with what earlier starts finished. Raises UserError, or StoppedError after a signal.
    """
    capabilities.check("evaluation", config.evaluation, config.machine)
    candidates(config.evaluation.sweep)  # a range that cannot be is an error before anything is read
    processes = Processes.start(config.machine.device, timeout=config.machine.timeout)
    with StopFlag() as stop, processes.telling_peers():
        found = checkpoints(config, processes)
        on_main(processes, lambda: _check_settings(config, found))
        studio, reference, origin = _prepare(config, processes, stop)
        results = []
        for checkpoint in found:
            scoring = Scoring(config, processes, studio, reference, origin, checkpoint)
            with scoring.locked(), processes.naming_lost_ranks("scoring"):
                check_versions(scoring)
                results.append(_score(scoring))
        stop.drain(processes)
    processes.close()
    return [result for result in results if result]


def _prepare(config: Config, processes: Processes, stop: StopFlag) -> tuple[Studio, Any, dict[str, Any]]:
    """Extractor and reference; network and sampler are built for the first weights."""
    evaluation = config.evaluation
    extractor = processes.main_first(lambda: open_extractor(evaluation, config.output_dir, processes.device))
    split = None if is_file(config) else reference_split(config)
    compared = None if split is None else load_split(config, processes, split)
    trained = compared
    if config.model.class_conditional and split != config.data.split:
        trained = load_split(config, processes, config.data.split)
    reference, origin = open_reference(config, processes, extractor, compared, stop)
    studio = Studio.build(
        config,
        processes,
        extractor,
        num_images=evaluation.num_images,
        num_classes=trained.num_classes if trained is not None else None,
        known_labels=trained.labels if trained is not None and config.model.class_conditional else None,
        stop=stop,
    )
    if processes.is_main:
        logger.info(_description(config, processes, studio, origin))
    return studio, reference, origin


def _check_settings(config: Config, found: list[Checkpoint | None]) -> None:
    """Raises UserError where the settings describe another model than the one that was trained."""
    for checkpoint in found:
        if checkpoint is not None:
            _check_checkpoint(config, checkpoint)


def _check_checkpoint(config: Config, checkpoint: Checkpoint) -> None:
    trained = checkpoint.manifest.get("settings")
    problems = [
        f"{key}: {before!r} was trained, {after!r} is set"
        for key, before, after in differing(trained or {}, to_dict(config), Effect.RUN | Effect.SAMPLES)
    ]
    if problems:
        lines = "\n  ".join(problems)
        raise UserError(f"{checkpoint.path}: the settings are not those of this run:\n  {lines}")


def _score(scoring: Scoring) -> dict[str, Any]:
    """One checkpoint; its results, on rank 0."""
    config, processes = scoring.config, scoring.processes
    # All names first: a wrong one is an error at once.
    sources = only_on_main(processes, lambda: _resolve(scoring)) or []
    count = processes.broadcast(len(sources))
    runs = prepare(scoring)
    complete = processes.broadcast(_is_complete(scoring, sources))
    start = time.perf_counter()
    if not complete:
        for place in tqdm(
            range(count), desc=f"step {scoring.step}", unit="copy", disable=not processes.is_main, leave=False
        ):
            scoring.score_source(sources[place] if sources else None)
    swept = sweep(scoring, runs, config.evaluation.sweep.search)
    results = only_on_main(processes, lambda: scoring.write(swept))
    if results is None:
        return {}
    head = "already complete" if complete and not runs else f"done in {time.perf_counter() - start:.0f} s"
    logger.info(f"\n{scoring.folder.results_path}: {head}")
    _show(results)
    return results


def _resolve(scoring: Scoring) -> list[NamedWeights]:
    """What `evaluation.weights` names, each once, however often it is spelled. Raises UserError for what cannot be sampled."""
    evaluation, averages = scoring.config.evaluation, scoring.config.averages
    found = [scoring.resolver.named(text) for text in evaluation.weights or ("raw", *averages)]
    for weights in found:
        scoring.studio.make_sampler(weights.pipeline)
    return list({weights.name: weights for weights in found}.values())


def _is_complete(scoring: Scoring, sources: list[NamedWeights]) -> bool:
    return bool(sources) and {source.name for source in sources} <= {row.row["weights"] for row in scoring.scores()}


def _show(results: dict[str, Any]) -> None:
    logger.info(heading(results))
    logger.info(table(results))
    if results.get("sweep"):
        logger.info(f"\n{table(results, results['sweep'])}\n{describe(results)}")
    for warning in results["warnings"]:
        logger.warning(f"{warning}")


def _description(config: Config, processes: Processes, studio: Studio, origin: dict[str, Any]) -> str:
    """What a person should see before the first image."""
    evaluation = config.evaluation
    precision = {"no": "fp32"}.get(evaluation.mixed_precision, evaluation.mixed_precision)
    threads = f", {torch.get_num_threads()} threads" if processes.device.type == "cpu" else ""
    lines = [
        f"device       {processes.device}{threads}, {precision}{', compiled' if evaluation.compile else ''}",
        f"processes    {processes.world_size}",
        f"features     {studio.extractor.name}, {studio.extractor.dim} of {studio.extractor.feature_layer}",
        f"reference    {evaluation.reference}, {origin.get('size', '?')} images",
    ]
    return "\n".join(lines)
