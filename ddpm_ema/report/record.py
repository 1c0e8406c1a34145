"""What a run directory says of its run, as plain data. No torch, nothing assumed to be complete."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ddpm_ema.numbers import metric_label, sampler_label
from ddpm_ema.report.schema import Logged, Manifest, Results, Row, Settings

SAMPLER = ("sampler", "num_inference_steps", "eta", "guidance_scale", "clip_sample")
# Keys of results.json that are no settings: they differ between two scorings that were made alike.
NO_SETTINGS = {
    *("schema", "step", "finished", "evaluation", "world_size", "rows", "pairs", "warnings"),
    *("sweep", "sweep_best", "sweep_search", "reference_saturated", "precision_of_noise"),
}


@dataclass(frozen=True)
class Scoring:
    """One results.json. `folder` is the name of its folder, `finished` in seconds since 1970."""

    folder: str
    results: Results = field(repr=False)
    finished: float
    grid: Path | None = None

    @property
    def step(self) -> int:
        return self.results.step

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """Rows from the lowest distance to the highest; those without a distance are left out."""
        return ranked(self.results.rows)

    @cached_property
    def sweep(self) -> tuple[Row, ...]:
        """Reconstructed averages that were scored beside the kept ones, from the lowest distance to the highest."""
        return ranked(self.results.sweep)

    @property
    def metric(self) -> str:
        """`FID`, only where the scoring says so; anything else names its extractor."""
        return metric_label({"metric": self.results.metric, "extractor": self.results.extractor})

    @property
    def sampler(self) -> str:
        """`ddim 25 steps, eta 0.5`."""
        return sampler_label({key: getattr(self.results, key) for key in SAMPLER})

    @property
    def conditions(self) -> str:
        """`With ddim in 25 steps (eta 0.5) and 1,797 images per average`: what every statement on this scoring holds for."""
        results, more = self.results, self.sampler.partition(" steps, ")[2]
        steps = f"{results.sampler} in {results.num_inference_steps} steps{f' ({more})' if more else ''}"
        return f"With {steps} and {results.num_images:,} images per average"

    @property
    def raw(self) -> Row | None:
        return next((row for row in self.rows if row.weights == "raw"), None)

    @property
    def compares_with_raw(self) -> bool:
        """Whether it includes raw and at least one average."""
        return self.raw is not None and len(self.rows) > 1

    @cached_property
    def significant(self) -> dict[frozenset[str], bool]:
        """{a, b} -> whether their paired difference is significant."""
        found = {frozenset((pair.a, pair.b)): pair.significant for pair in self.results.pairs}
        versus_raw = {row.weights: row.versus_raw for row in self.rows}
        return found | {
            frozenset((name, "raw")): gap.significant for name, gap in versus_raw.items() if gap is not None
        }

    @cached_property
    def settings(self) -> dict[str, str]:
        """Everything that was set for this scoring and may change its numbers, versions among it, by dotted key."""
        return dict(_flat(self.results.model_dump(mode="json", exclude=NO_SETTINGS)))

    def comparable(self, other: Scoring) -> bool:
        """Whether both may stand on one curve: the same settings, of whatever versions."""
        keys = {key for key in (*self.settings, *other.settings) if not key.startswith("versions.")}
        return all(self.settings.get(key) == other.settings.get(key) for key in keys)


def ranked(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    return tuple(sorted((row for row in rows if row.frechet_distance is not None), key=lambda row: row.distance))


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", plain(value)


def plain(value: Any) -> str:
    """A scalar as people write it; what is longer than a line is cut."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    text = f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


@dataclass
class Record:
    """Everything that a run directory says about its run. `problems` names the files that could not be read."""

    path: Path
    settings: Settings = field(default_factory=Settings)
    config_text: str = ""
    manifest: Manifest = field(default_factory=Manifest)
    training: list[Logged] = field(default_factory=list)
    quick: list[tuple[int, tuple[Row, ...]]] = field(default_factory=list)
    scorings: list[Scoring] = field(default_factory=list)
    sample_grids: list[tuple[int, Path]] = field(default_factory=list)
    num_parameters: int | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def profiles(self) -> dict[str, dict[str, Any]]:
        """Averages that training kept: name -> rule."""
        return {**self.settings.averages, **self.manifest.profiles}

    @property
    def names(self) -> list[str]:
        """Names of the weights, raw first, then as the settings list them, then what else was scored."""
        scored = [row.name for scoring in self.scorings for row in scoring.rows]
        return list(dict.fromkeys(["raw", *self.profiles, *scored]))

    @property
    def last_step(self) -> int | None:
        """The last step that metrics, a checkpoint or a scoring tell of."""
        logged = (row.step for row in self.training[-1:])
        steps = [self.manifest.step, *logged, *(scoring.step for scoring in self.scorings)]
        return max((step for step in steps if step is not None), default=None)
