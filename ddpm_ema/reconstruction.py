"""The command `ddpm-ema reconstruct`: a run's snapshots → files of averages that were not stored, and plans of what to store."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ddpm_ema import config as settings
from ddpm_ema import options
from ddpm_ema.averaging.coefficients import MAX_PREDICTED_ERROR, RAW
from ddpm_ema.averaging.files import save_tensors
from ddpm_ema.averaging.plan import plans
from ddpm_ema.averaging.profiles import BiasCorrected, PowerFunction, Profile, Uniform
from ddpm_ema.averaging.snapshots import snapshot_metadata
from ddpm_ema.errors import UserError, explained
from ddpm_ema.named_weights import NamedWeights, WeightResolver, name_of, parse_target
from ddpm_ema.numbers import MISSING, aligned, listed
from ddpm_ema.rundir import RunDir, step_folder


def save(weights: NamedWeights, target: Profile, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Writes `<folder>/<name>.safetensors`, fp32 by parameter name; the file's metadata says what it is and how good.

    Returns the file, and as plain objects what was asked for and how well it was matched.
    """
    path = folder / f"{name_of(target)}.safetensors"
    summary: dict[str, Any] = {"weights": name_of(target), "profile": weights.profile, "step": weights.step}
    summary |= {**(weights.reconstruction or {}), "warnings": list(weights.warnings)}
    assert weights.step is not None
    metadata = snapshot_metadata(weights.step, target, reconstruction=summary)
    try:
        save_tensors(path, weights.members[0](), metadata)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another folder with --out") from None
    return path, summary


def table(summaries: Sequence[Mapping[str, Any]]) -> str:
    """How good each reconstruction is, for a terminal."""
    rows = [("weights", "step", "snapshots", "predicted error", "amplification", "check", "predicted", "actual")]
    for entry in summaries:
        check = entry["check"] or {"weights": "", "predicted": None, "actual": None}
        made = (str(entry["weights"]), f"{entry['step']:,}", str(entry["num_snapshots"]))
        errors = (_percent(entry["predicted_relative_error"]), f"{entry['amplification']:.1f}")
        rows.append((*made, *errors, str(check["weights"]), _percent(check["predicted"]), _percent(check["actual"])))
    warnings = [f"warning: {entry['weights']}: {text}" for entry in summaries for text in entry["warnings"]]
    return "\n".join([*aligned(rows, left=(0, 5)), *warnings])


def _percent(share: float | None) -> str:
    return MISSING if share is None else f"{share:.2%}" if share < 10 else f"{100 * share:.0f}%"


WANTED = (
    *(PowerFunction(std) for std in (0.02, 0.03, 0.05, 0.10, 0.15, 0.20, 0.25)),
    *(BiasCorrected(decay) for decay in (0.99, 0.999, 0.9999, 0.99999)),
    Uniform(),
)
"""The targets of a plan where none are named."""


def plan_text(training: settings.TrainingSettings, targets: Sequence[Profile], room: float, size: float) -> str:
    """For a terminal: the predicted error of each plan, which one to take, and which averages it cannot reconstruct.

    `room`: bytes for snapshots, of `size` bytes each. Raises UserError where no plan fits.
    """
    with explained("--plan: ", ValueError, ZeroDivisionError):
        found = plans(training.steps, targets, int(room / size), step_variance=training.step_variance)
    best = found[0]
    names = [" + ".join("raw" if one == RAW else name_of(one) for one in plan.stored) for plan in found]
    rows = [["stored", *names], ["every", *(f"{plan.every:,} steps" for plan in found)]]
    rows.append(["disk", *(f"{plan.num_files * size / 1e9:.3g} GB" for plan in found)])
    rows += [[name_of(target), *(_percent(plan.errors[i]) for plan in found)] for i, target in enumerate(targets)]
    lines = aligned(rows)
    lines.append(f"Store {names[0]} every {best.every:,} steps (checkpoints.snapshots, checkpoints.snapshots_every).")
    if lost := best.beyond(MAX_PREDICTED_ERROR):
        kept = listed([name_of(targets[place]) for place in lost])
        lines.append(f"Keep {kept} while training: their predicted error is {MAX_PREDICTED_ERROR:.0%} or more.")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """The command `ddpm-ema reconstruct`: one file per target, then a table of how far each can be trusted; or a plan."""
    parser = options.reconstruct()
    arguments = parser.parse_args(argv)
    targets = [parse_target(text) for text in arguments.target]
    if arguments.plan:
        steps = {"training.steps": [f"{arguments.steps:.0f}"]} if arguments.steps is not None else {}
        training = settings.load(arguments.config, steps).training
        print(plan_text(training, targets or WANTED, arguments.budget, 4 * arguments.parameters))
        return []
    if arguments.run is None or not targets:
        parser.error("give a run directory and one --target or more, or --plan")
    if len({name_of(target) for target in targets}) < len({*targets}):
        raise UserError("--target: several have one name, and would be one file; give each its own command and --out")
    run = RunDir(arguments.run)
    config = settings.load(run.config_path) if run.config_path.is_file() else None
    resolver = WeightResolver(run, None, config)
    found = [(target, resolver.reconstructed(target, arguments.step)) for target in targets]
    folder = arguments.out or run.path / "reconstructed" / step_folder(found[0][1].step or 0)
    with RunDir(folder).lock():
        made = [save(weights, target, folder) for target, weights in found]  # reads the tensors of one target at a time
    print(table([summary for _, summary in made]))
    for path, _ in made:
        print(f"wrote {path}")
    return [path for path, _ in made]
