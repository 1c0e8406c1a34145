"""`run`: from settings to results.json, grid and table, for every checkpoint asked for."""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from ddpm_ema import capabilities, data, numbers
from ddpm_ema.config import Config, digest
from ddpm_ema.distributed import Processes, StopFlag
from ddpm_ema.errors import UserError
from ddpm_ema.features import Extractor, open_extractor
from ddpm_ema.messages import logger
from ddpm_ema.named_weights import NamedWeights, WeightResolver
from ddpm_ema.own_statistics import with_own_statistics
from ddpm_ema.rundir import Checkpoint, RunDir
from ddpm_ema.score.checkpoints import checkpoints
from ddpm_ema.score.driver import Driver, Jobs, even_batch
from ddpm_ema.score.folder import ScoreFolder
from ddpm_ema.score.generate import Generator
from ddpm_ema.score.real_images import RealImages
from ddpm_ema.score.reference import floor_split, open_references, reference_split
from ddpm_ema.score.results import heading, sampling_settings, settings_of, table
from ddpm_ema.score.sampled import Sampled
from ddpm_ema.score.scorer import Scorer
from ddpm_ema.score.sweep import Sweep, candidates, describe, summary
from ddpm_ema.score.versions import check_versions


def run(config: Config) -> list[dict[str, Any]]:
    """Scores the weights that `evaluation` names, and goes on with what earlier starts finished.

    Returns what results.json says, one entry per checkpoint and extractor; nothing on ranks other than 0. Raises UserError for
    settings, weights or files that cannot be scored.
    """
    capabilities.check("evaluation", config.evaluation, config.machine)
    candidates(config.evaluation.sweep)  # an impossible range is an error before anything is read
    processes = Processes.start(config.machine.device, timeout=config.machine.timeout)
    with StopFlag(nothing_to_save=True) as stop, processes.telling_peers(), processes.naming_lost_ranks("scoring"):
        found = processes.on_main(lambda: checkpoints(config), "reading checkpoints")
        generator = open_generator(config, processes)
        open_beside(generator, processes)
        results = Driver(processes, generator, stop).run(_score_all(generator, found, processes.world_size))
    processes.close()
    return results or []


def open_generator(config: Config, processes: Processes, trained: Any = None) -> Generator:
    """Extractors and the data that they need, on every rank; the others find what rank 0 left in the cache.

    `trained` is the data set that was trained on, where it is loaded already.
    """
    evaluation, datasets = config.evaluation, {config.data.split: trained} if trained is not None else {}

    def open_all() -> list[Extractor]:
        most = evaluation.extractor_batch_size
        return [open_extractor(entry, config.output_dir, processes.device, most) for entry in evaluation.extractors]

    extractors = processes.main_first(open_all, "opening the feature extractors")
    for split in (config.data.split if config.model.class_conditional else None, reference_split(config)):
        if split is not None and split not in datasets:
            datasets[split] = load_split(config, processes, split)
    batch_size = even_batch(evaluation.num_images, processes.world_size, evaluation.batch_size)
    return Generator(config, extractors, batch_size, datasets)


def open_beside(generator: Generator, processes: Processes) -> None:
    """Adds the real images that are compared with the reference, and those that were trained on, where they are at hand."""
    config = generator.config
    lacking = {config.data.split: "no training images, of which the report shows the nearest to samples"}
    lacking[floor_split(config)] = "the table has no line of real images"
    for split, text in lacking.items():
        try:
            if split and split not in generator.datasets:
                dataset = load_split(config, processes, split)
                if len(dataset) < 3:  # fewer have no error bars
                    raise UserError(f"{split} has {len(dataset)} images")
                generator.datasets[split] = dataset
        except UserError as error:
            if processes.is_main:
                logger.info(f"{text}: {error}")


def load_split(config: Config, processes: Processes, split: str) -> Any:
    return processes.main_first(lambda: data.load(config.data, split=split), "reading the images")


def _score_all(generator: Generator, found: list[Checkpoint | None], world_size: int) -> Jobs[list[dict[str, Any]]]:
    """What rank 0 does."""
    config, datasets = generator.config, generator.datasets
    references = yield from open_references(generator)
    floors = (yield from open_references(generator, "floor")) if floor_split(config) in datasets else {}
    real = [
        RealImages(config, extractor, references[key], floors.get(key), datasets.get(config.data.split))
        for key, extractor in generator.extractors.items()
    ]
    logger.info(_description(generator, real, world_size))
    results = []
    for checkpoint in found:
        results += yield from _score(generator, real, checkpoint, world_size)
    return results


def _score(
    generator: Generator, real: Sequence[RealImages], checkpoint: Checkpoint | None, world_size: int
) -> Jobs[list[dict[str, Any]]]:
    """Scores one checkpoint (None: weights that need none): a table per extractor, from one sampling."""
    config = generator.config
    rundir, step = RunDir(config.output_dir), checkpoint.step if checkpoint is not None else 0
    samples = digest(sampling_settings(config, generator.known_labels))
    settle = partial(with_own_statistics, config=config, device=generator.device)
    resolver = WeightResolver(rundir, checkpoint, config, generator.num_classes, lambda: generator.own_pipeline, settle)
    target = RunDir(config.evaluation.output or rundir.path)
    with RunDir(target.score_dir(step, samples)).lock():
        sampled = Sampled(target.score_dir(step, samples), generator)
        scorers, results = [], []
        for one in real:
            origin = {**one.reference.origin, "size": one.reference.statistics.count}
            settings = settings_of(config, one.extractor, origin, generator.known_labels)
            folder = ScoreFolder(target.score_dir(step, f"{samples}-{digest(settings)}"))
            scorers.append(Scorer(generator, one, resolver, sampled, folder, settings, world_size))
        wanted = scorers[0].named()  # all names first: a wrong one is an error at once
        kinds = candidates(config.evaluation.sweep, step).values()
        sweeps = [[Sweep(scorer, of_kind) for of_kind in kinds] for scorer in scorers]
        yield from check_versions(scorers)
        for scorer, own_sweeps in zip(scorers, sweeps, strict=True):
            results.append((yield from _table(scorer, wanted, own_sweeps)))
    return results


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
    shares = {row["weights"]: row["saturated"] for row in (*results["rows"], *results.get("sweep", ()))}
    if text := numbers.saturation(shares, results["reference_saturated"]):  # of all weights at once
        logger.warning(text)
    for warning in results["warnings"]:
        names = [row["weights"] for row in results["rows"] if warning in row["warnings"]]
        logger.warning((f"{numbers.listed(names)}: " if 0 < len(names) < len(results["rows"]) else "") + warning)


def _description(generator: Generator, real: Sequence[RealImages], world_size: int) -> str:
    """What a person should see before the first image."""
    evaluation, device = generator.config.evaluation, generator.device
    precision = {"no": "fp32"}.get(evaluation.mixed_precision, evaluation.mixed_precision)
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    lines = [
        f"device       {device}{threads}, {precision}{', compiled' if evaluation.compile else ''}",
        f"processes    {world_size}",
        *(f"features     {one.extractor.label}, {one.extractor.dim:,} dimensions" for one in real),
        f"reference    {evaluation.reference}, {real[0].reference.statistics.count:,} images",
    ]
    return "\n".join(lines)
