"""`run`: from settings to results.json, grid and table, for every checkpoint asked for."""

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from ddpm_ema import capabilities, data
from ddpm_ema.config import Config, digest
from ddpm_ema.distributed import Processes, StopFlag
from ddpm_ema.errors import UserError
from ddpm_ema.features import Extractor, open_extractor
from ddpm_ema.messages import logger
from ddpm_ema.metrics import Reference
from ddpm_ema.named_weights import NamedWeights, WeightResolver
from ddpm_ema.numbers import listed
from ddpm_ema.own_statistics import with_own_statistics
from ddpm_ema.rundir import Checkpoint, RunDir
from ddpm_ema.score.checkpoints import checkpoints
from ddpm_ema.score.driver import Driver, Jobs, even_batch
from ddpm_ema.score.floor import Floor
from ddpm_ema.score.folder import ScoreFolder
from ddpm_ema.score.generate import Generator
from ddpm_ema.score.reference import floor_split, open_references, reference_split, trained_on
from ddpm_ema.score.results import heading, sampling_settings, settings_of, table
from ddpm_ema.score.sampled import Sampled
from ddpm_ema.score.scorer import Scorer
from ddpm_ema.score.sweep import Sweep, candidates, describe, summary
from ddpm_ema.score.training_images import TrainingImages
from ddpm_ema.score.versions import check_versions


def run(config: Config) -> list[dict[str, Any]]:
    """Scores the weights that `evaluation` names, and goes on with what earlier starts finished.

    Returns what results.json says, one entry per checkpoint and extractor; nothing on ranks other than 0. Raises UserError for
    settings, weights or files that cannot be scored.
    """
    capabilities.check("evaluation", config.evaluation, config.machine)
    candidates(config.evaluation.sweep)  # an impossible range is an error before anything is read
    processes = Processes.start(config.machine.device, timeout=config.machine.timeout)
    with StopFlag() as stop, processes.telling_peers(), processes.naming_lost_ranks("scoring"):
        found = processes.on_main(lambda: checkpoints(config), "reading checkpoints")
        generator = open_generator(config, processes)
        generator.datasets |= open_floor(config, processes)
        generator.datasets |= open_trained(config, processes, generator.datasets)
        results: list[dict[str, Any]] = []
        jobs = _score_all(config, generator, found, processes.world_size, results)
        Driver(processes, generator, stop).run(jobs)
    processes.close()
    return results


def open_generator(config: Config, processes: Processes, trained: Any = None) -> Generator:
    """Extractors and data, on every rank; the others find what rank 0 left in the cache.

    `trained` is the data set that was trained on, where it is loaded already.
    """
    evaluation, split = config.evaluation, reference_split(config)

    def open_all() -> list[Extractor]:
        most = evaluation.extractor_batch_size
        return [open_extractor(entry, config.output_dir, processes.device, most) for entry in evaluation.extractors]

    extractors = processes.main_first(open_all, "opening the feature extractors")
    if trained is None and (config.model.class_conditional or split == config.data.split):
        trained = load_split(config, processes, config.data.split)
    compared = trained if split == config.data.split else None
    if split is not None and split != config.data.split:
        compared = load_split(config, processes, split)
    batch_size = even_batch(evaluation.num_images, processes.world_size, evaluation.batch_size)
    datasets = {"reference": compared} if compared is not None else {}
    return Generator(config, extractors, batch_size, trained, datasets)


def open_floor(config: Config, processes: Processes) -> dict[str, Any]:
    """The real images that are compared with the reference; empty where there are none."""
    split = floor_split(config)
    try:
        return {"floor": load_split(config, processes, split)}
    except UserError as error:
        if split != "test":
            raise
        if processes.is_main:
            logger.debug(str(error))
            logger.info(
                "no split 'test', and no data.held_out from before training: the table has no line of real images"
            )
        return {}


def open_trained(config: Config, processes: Processes, opened: Mapping[str, Any]) -> dict[str, Any]:
    """The images that were trained on, unless they are `opened`; empty where they are not at hand."""
    if "trained" in opened or trained_on(config) == "floor":
        return {"trained": opened.get("trained", opened.get("floor"))}
    try:
        return {"trained": load_split(config, processes, config.data.split)}
    except UserError as error:
        if processes.is_main:
            logger.info(f"no training images, of which the report shows the nearest to samples: {error}")
        return {}


def load_split(config: Config, processes: Processes, split: str) -> Any:
    return processes.main_first(lambda: data.load(config.data, split=split), "reading the images")


def _score_all(
    config: Config, generator: Generator, found: list[Checkpoint | None], world_size: int, results: list[dict[str, Any]]
) -> Jobs[None]:
    """What rank 0 does; it adds to `results`."""
    references = yield from open_references(config, generator)
    images = (yield from open_references(config, generator, "floor")) if "floor" in generator.datasets else {}
    floors = {key: Floor(config, images[key], references[key], generator.device) for key in images}
    seen = {"reference": references, "floor": images}.get(trained_on(config) or "", {})
    trained = {
        key: TrainingImages(generator.datasets["trained"], extractor, seen[key].features if key in seen else None)
        for key, extractor in generator.extractors.items()
        if "trained" in generator.datasets
    }
    real = {key: (floors.get(key), trained.get(key)) for key in generator.extractors}
    logger.info(_description(config, generator, references, world_size))
    for checkpoint in found:
        yield from _score(config, generator, references, real, checkpoint, world_size, results)


def _score(
    config: Config,
    generator: Generator,
    references: Mapping[str, Reference],
    real: Mapping[str, tuple[Floor | None, TrainingImages | None]],
    checkpoint: Checkpoint | None,
    world_size: int,
    results: list[dict[str, Any]],
) -> Jobs[None]:
    """Scores one checkpoint (None: weights that need none): a table per extractor, from one sampling."""
    rundir, step = RunDir(config.output_dir), checkpoint.step if checkpoint is not None else 0
    samples = digest(sampling_settings(config, generator.known_labels))
    settle = partial(with_own_statistics, config=config, device=generator.device)
    resolver = WeightResolver(rundir, checkpoint, config, generator.num_classes, lambda: generator.own_pipeline, settle)
    target = RunDir(config.evaluation.output or rundir.path)
    with RunDir(target.score_dir(step, samples)).lock():
        sampled = Sampled(target.score_dir(step, samples), generator)
        scorers = []
        for key, extractor in generator.extractors.items():
            origin = {**references[key].origin, "size": references[key].statistics.count}
            settings = settings_of(config, extractor, origin, generator.known_labels)
            folder = ScoreFolder(target.score_dir(step, f"{samples}-{digest(settings)}"))
            tables = (sampled, folder, settings, world_size, *real[key])
            scorers.append(Scorer(config, generator, extractor, references[key], resolver, *tables))
        wanted = scorers[0].named()  # all names first: a wrong one is an error at once
        kinds = candidates(config.evaluation.sweep, step).values()
        sweeps = [[Sweep(scorer, of_kind) for of_kind in kinds] for scorer in scorers]
        yield from check_versions(scorers)
        for scorer, own_sweeps in zip(scorers, sweeps, strict=True):
            results.append((yield from _table(scorer, wanted, own_sweeps)))


def _table(scorer: Scorer, wanted: Sequence[NamedWeights], sweeps: Sequence[Sweep]) -> Jobs[dict[str, Any]]:
    """One extractor's results. What its images need the first table samples, for all."""
    start, complete = time.perf_counter(), scorer.is_complete(wanted)
    spent: dict[str, Any] = {}
    for weights in [] if complete else wanted:
        yield from scorer.score(weights)
    for sweep in sweeps:
        spent |= yield from sweep.jobs(scorer.config.evaluation.sweep.search)
    results = scorer.write(summary(scorer, spent))
    head = "already complete" if complete and not sweeps else f"done in {time.perf_counter() - start:.0f} s"
    logger.info(f"\n{scorer.folder.results_path}: {head}")
    _show(results)
    return results


def _show(results: dict[str, Any]) -> None:
    logger.info(heading(results))
    logger.info(table(results))
    if results.get("sweep"):
        logger.info(describe(results))
    for warning in results["warnings"]:
        names = [row["weights"] for row in results["rows"] if warning in row["warnings"]]
        logger.warning((f"{listed(names)}: " if 0 < len(names) < len(results["rows"]) else "") + warning)


def _description(config: Config, generator: Generator, references: Mapping[str, Reference], world_size: int) -> str:
    """What a person should see before the first image."""
    evaluation, device = config.evaluation, generator.device
    precision = {"no": "fp32"}.get(evaluation.mixed_precision, evaluation.mixed_precision)
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    lines = [
        f"device       {device}{threads}, {precision}{', compiled' if evaluation.compile else ''}",
        f"processes    {world_size}",
        *(f"features     {one.label}, {one.dim:,} dimensions" for one in generator.extractors.values()),
        f"reference    {evaluation.reference}, {next(iter(references.values())).statistics.count:,} images",
    ]
    return "\n".join(lines)
