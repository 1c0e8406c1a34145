"""The files of a run directory as the report reads them. A file of another shape is refused, with the place named.

Only what the report uses is declared; what else a file holds is kept as it is (`extra`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field

SCHEMA = 2
LARGEST = 1e30  # matplotlib overflows on what is far beyond


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
Ends = tuple[Number, Number]


class Shape(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True, strict=True, protected_namespaces=())

    def get(self, key: str) -> float | None:
        """Any further number of this object, or None."""
        return number(getattr(self, key, None))


@dataclass(frozen=True)
class Difference:
    """A paired difference with its standard error and interval, in units of the distance. `significant`: as the scorer says."""

    delta: float
    stderr: float
    low: float
    high: float
    significant: bool


class Row(Shape):
    """One scored entry of `rows`, `sweep`, or a quick scoring. What was not computed is None."""

    weights: Annotated[str, Field(min_length=1)]
    frechet_distance: Number = None
    frechet_distance_unbiased: Number = None
    stderr: Error = None
    delta_vs_raw: Number = None
    delta_stderr: Error = None
    interval: Ends | None = None
    significant: bool | None = None
    saturated: Number = None
    seconds: Number = None
    warnings: tuple[str, ...] = ()
    metric: str = ""

    @property
    def name(self) -> str:
        """The weights without their step: `ema_0_999` of `ema_0_999@1500`."""
        return self.weights.partition("@")[0]

    @property
    def distance(self) -> float:
        """The bias-corrected distance, which ranks; the plain one where there is no other. Lower is better."""
        corrected, plain = self.frechet_distance_unbiased, self.frechet_distance
        return corrected if corrected is not None else plain if plain is not None else LARGEST

    @property
    def versus_raw(self) -> Difference | None:
        """The paired difference from raw; None unless every part is known."""
        low, high = self.interval or (None, None)
        delta, stderr, significant = self.delta_vs_raw, self.delta_stderr, self.significant
        if delta is None or stderr is None or low is None or high is None or significant is None:
            return None
        return Difference(delta, stderr, low, high, significant)


class Pair(Shape):
    """Whether the paired difference of two rows is significant."""

    a: str
    b: str
    significant: bool


class VersusKept(Shape):
    """The paired difference of a sweep's best from the best of the kept averages, `weights`."""

    weights: str
    delta: Number = None
    stderr: Error = None
    significant: bool | None = None


class SweepBest(Shape):
    """The lowest candidate of one sweep, and those that are not significantly worse."""

    weights: str
    not_significantly_worse: tuple[str, ...] = ()
    versus_best_kept: VersusKept | None = None


class Results(Shape):
    """results.json of one scoring."""

    step: Step
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
    rows: tuple[Row, ...]
    finished: AwareDatetime | None = None
    evaluation: dict[str, Any] = {}
    extractor_sha256: str = ""
    reference_saturated: Number = None
    precision_of_noise: Number = None
    pairs: tuple[Pair, ...] = ()
    sweep: tuple[Row, ...] = ()
    sweep_best: dict[str, SweepBest] = {}
    warnings: tuple[str, ...] = ()


class DataSection(Shape):
    source: str = ""
    name: str | None = None
    image_size: Step | None = None
    channels: Step | None = None


class ModelSection(Shape):
    block_out_channels: list[Step] = []


class DiffusionSection(Shape):
    num_train_timesteps: Step = 1000


class TrainingSection(Shape):
    steps: Step | None = None
    batch_size: Step | None = None


class Settings(Shape):
    """config.yaml, as plain objects."""

    data: DataSection = DataSection()
    model: ModelSection = ModelSection()
    diffusion: DiffusionSection = DiffusionSection()
    training: TrainingSection = TrainingSection()
    averages: dict[str, dict[str, Any]] = {}
    evaluation: dict[str, Any] = {}


class Dataset(Shape):
    name: str = ""
    size: Step | None = None
    fingerprint: str = ""


class Manifest(Shape):
    """manifest.json of a checkpoint."""

    step: Step | None = None
    settings: Settings = Settings()
    dataset: Dataset = Dataset()
    world_size: Step = 1
    versions: dict[str, str] = {}
    profiles: dict[str, dict[str, Any]] = {}
    weightings: dict[str, list[Number]] = {}


class Logged(Shape):
    """One line of metrics.jsonl: what was logged at a step, or the rows of a quick scoring."""

    step: Step
    scores: tuple[Row, ...] | None = None
