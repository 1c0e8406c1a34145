"""The files of a run directory as the report reads them, and what they say together. No torch, nothing assumed to be complete.

Only the fields that the report uses are declared; `extra` keeps the others. pydantic refuses a file with another structure and
names the place.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, AliasPath, AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field

from ddpm_ema.numbers import metric_label, precision_note, reading, sampler_label, saturation
from ddpm_ema.weight_names import split_step

SCHEMA = 3
LARGEST = 1e30  # a larger figure is not drawn
HASH = re.compile(r"\A([0-9a-f]{12})[0-9a-f]{28,52}\Z")
# Keys of results.json that are no settings: they differ between two scorings with the same settings.
NO_SETTINGS = {
    *("schema", "step", "finished", "evaluation", "world_size", "rows", "may_be_best", "warnings", "folder", "grid"),
    *("sweep", "sweep_search", "reading", "floor", "reference_saturated", "precision_of_noise"),
}


def number(value: Any) -> float | None:
    """A finite float of a size that can be drawn, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < LARGEST:
        return None
    return float(value)


def _finite(value: Any) -> Any:
    """None for a float that is not finite (JSON written by Python may hold NaN); other types are left to be refused."""
    return number(value) if isinstance(value, float) else value


Step = Annotated[int, Field(ge=0, lt=2**63)]
Number = Annotated[float | None, BeforeValidator(_finite)]
Error = Annotated[Annotated[float, Field(ge=0)] | None, BeforeValidator(_finite)]


class Shape(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True, strict=True, protected_namespaces=())

    def get(self, key: str) -> float | None:
        """Any further number of this object, or None."""
        return number(getattr(self, key, None))


class Difference(NamedTuple):
    """A paired difference, its standard error and interval, in units of the distance.

    `significant`: as the scorer says, at the error rate of the whole table; the interval leaves zero out in that case alone.
    """

    delta: float
    stderr: float
    low: float
    high: float
    significant: bool


class MeasureDifference(Shape):
    """The paired difference from raw in KID, precision or recall; `significant` as for the distance."""

    delta: Number = None
    stderr: Error = None
    significant: bool = False


class Row(Shape):
    """One scored entry of `rows`, `sweep`, or a quick scoring. What was not computed is None."""

    weights: Annotated[str, Field(min_length=1)]
    weights_sha256: str = ""
    num_images: Step = 0
    frechet_distance: Number = None
    frechet_distance_unbiased: Number = None
    stderr: Error = None
    delta_vs_raw: Number = None
    delta_stderr: Error = None
    interval: tuple[Number, Number] | None = None
    significant: bool | None = None
    estimate: dict[str, Any] = {}
    measures_vs_raw: dict[str, MeasureDifference] = {}
    saturated: Number = None
    seconds: Number = None
    warnings: tuple[str, ...] = ()
    metric: str = ""

    @property
    def name(self) -> str:
        """The weights without their step: `ema_0_999` of `ema_0_999@1500`."""
        return split_step(self.weights)[0]

    @property
    def distance(self) -> float:
        """The bias-corrected distance, which ranks; the plain one where there is no other. Lower is better."""
        corrected, plain = self.frechet_distance_unbiased, self.frechet_distance
        return corrected if corrected is not None else plain if plain is not None else LARGEST

    @property
    def versus_raw(self) -> Difference | None:
        """The paired difference from raw; None unless every part is known."""
        parts: tuple[Any, ...] = (self.delta_vs_raw, self.delta_stderr, *(self.interval or (None,)), self.significant)
        return None if None in parts else Difference(*parts)


def _ranked(rows: Iterable[Row]) -> tuple[Row, ...]:
    return tuple(sorted((row for row in rows if row.frechet_distance is not None), key=lambda row: row.distance))


Ranked = Annotated[tuple[Row, ...], AfterValidator(_ranked)]
"""Rows from the lowest distance to the highest; those without a distance are left out."""


class Floor(Shape):
    """The distance of real images of `split` from the reference."""

    distance: Number = None
    stderr: Error = None
    split: str = ""


class Scoring(Shape):
    """results.json of one scoring; `sweep` are reconstructed averages that were scored beside the stored ones."""

    step: Step
    finished: AwareDatetime
    metric: str
    extractor: str
    reference: str
    num_images: Step
    sampler: str
    num_inference_steps: Step
    eta: Number = None
    guidance_scale: Number = None
    clip_sample: bool | None = None
    seed: int
    rows: Ranked
    evaluation: dict[str, Any] = {}
    extractor_sha256: str = ""
    reference_saturated: Number = None
    precision_of_noise: Number = None
    floor: Floor | None = None
    reading: str = ""
    may_be_best: tuple[str, ...]
    sweep: Ranked = ()
    warnings: tuple[str, ...] = ()
    # Not of the file: the name of its folder, and the grid of samples in it.
    folder: str = ""
    grid: Path | None = None

    @property
    def metric_name(self) -> str:
        """`FID`, only where the scoring says so; anything else names its extractor."""
        return metric_label(dict(self))

    @property
    def against(self) -> str:
        """`against these training images (train of digits, 1797 images)`: what the distances are from."""
        return reading(dict(self))

    @property
    def entries(self) -> tuple[Row, ...]:
        """All weights that were scored, candidates of a sweep among them, each name once, the lowest distance first."""
        by_name = {row.weights: row for row in (*self.sweep, *self.rows)}
        return _ranked(by_name.values())

    @property
    def sampling(self) -> str:
        """`ddim 25 steps, eta 0.5`."""
        return sampler_label(dict(self))

    @property
    def conditions(self) -> str:
        """`With ddim in 25 steps (eta 0.5) and 1,797 images per average`: what every statement on this scoring holds for."""
        more = self.sampling.partition(" steps, ")[2]
        steps = f"{self.sampler} in {self.num_inference_steps} steps{f' ({more})' if more else ''}"
        return f"With {steps} and {self.num_images:,} images per average"

    @property
    def precision_note(self) -> str:
        """As `numbers.precision_note`."""
        return precision_note(self.precision_of_noise)

    def saturation(self, rows: Iterable[Row]) -> str:
        """As `numbers.saturation`, of these rows."""
        return saturation({row.weights: row.saturated for row in rows}, self.reference_saturated)

    @property
    def raw(self) -> Row | None:
        return next((row for row in self.rows if row.weights == "raw"), None)

    @property
    def compares_with_raw(self) -> bool:
        """Whether it includes raw and at least one average."""
        return self.raw is not None and len(self.entries) > 1

    @property
    def settings(self) -> dict[str, str]:
        """Everything that was set for this scoring and may change its numbers, versions among it, by dotted key."""
        return dict(flat(self.model_dump(mode="json", exclude=NO_SETTINGS)))

    def comparable(self, other: Scoring) -> bool:
        """Whether both may be points of one curve: the same settings, of whatever versions."""
        ours, theirs = self.settings, other.settings
        return all(ours.get(k) == theirs.get(k) for k in (*ours, *theirs) if not k.startswith("versions."))


def flat(tree: Any, key: str = "", depth: int = 3) -> Iterator[tuple[str, str]]:
    """Settings by dotted key, only as deep as ours are: a stranger's YAML may unfold to gigabytes."""
    if isinstance(tree, dict) and depth:
        for name, value in tree.items():
            yield from flat(value, f"{key}.{name}".lstrip("."), depth - 1)
    else:
        items = tree if isinstance(tree, list) else [tree]
        yield key, ", ".join(plain(item) for item in items if not isinstance(item, (dict, list)))


def differences(settings: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    """Key of a setting -> its value in each, for settings that are not the same in all. Of a hash, the first digits."""
    keys = dict.fromkeys(key for one in settings for key in one if key != "settings_digest")
    values = {key: [one.get(key, "none") for one in settings] for key in keys}
    return {key: [HASH.sub(r"\1", one)[:100] for one in found] for key, found in values.items() if len(set(found)) > 1}


def plain(value: Any) -> str:
    """A scalar as people write it; what is longer than a line is cut."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    text = f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _at(*path: str) -> Any:
    """Where a field stands in the file: `_at("data", "channels")` is data.channels."""
    return Field(validation_alias=AliasPath(*path))


class Settings(Shape):
    """config.yaml."""

    data_source: Annotated[str, _at("data", "source")] = ""
    data_name: Annotated[str | None, _at("data", "name")] = None
    image_size: Annotated[Step | None, _at("data", "image_size")] = None
    channels: Annotated[Step | None, _at("data", "channels")] = None
    block_out_channels: Annotated[list[Step], _at("model", "block_out_channels")] = []
    factory: Annotated[str | None, _at("model", "factory")] = None
    num_train_timesteps: Annotated[Step, _at("diffusion", "num_train_timesteps")] = 1000
    training_steps: Annotated[Step | None, _at("training", "steps")] = None
    batch_size: Annotated[Step | None, _at("training", "batch_size")] = None
    averages: dict[str, dict[str, Any]] = {}
    evaluation: dict[str, Any] = {}


class Manifest(Shape):
    """manifest.json of a checkpoint."""

    step: Step | None = None
    settings: Settings = Settings()
    data_name: Annotated[str, _at("dataset", "name")] = ""
    data_size: Annotated[Step | None, _at("dataset", "size")] = None
    data_fingerprint: Annotated[str, _at("dataset", "fingerprint")] = ""
    world_size: Step = 1
    versions: dict[str, str] = {}
    profiles: dict[str, dict[str, Any]] = {}
    weightings: dict[str, list[Number]] = {}


class Logged(Shape):
    """One line of metrics.jsonl: what was logged at a step, or the rows of a quick scoring."""

    step: Step
    scores: Ranked | None = None


@dataclass
class Record:
    """Everything that a run directory says about its run. `problems` names the files that could not be read."""

    path: Path
    settings: Settings = field(default_factory=Settings)
    config_text: str = ""
    manifest: Manifest = field(default_factory=Manifest)
    training: list[Logged] = field(default_factory=list)
    quick: list[Logged] = field(default_factory=list)
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
