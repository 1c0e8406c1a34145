"""`ddpm-ema COMMAND ...`: the one entry to every stage. It turns a user's mistake into one message and an exit code.

A stage is imported when it runs, so that `--help` does not wait for torch.
"""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpm_ema import options
from ddpm_ema.errors import EXIT_DONE, UserError, nearest
from ddpm_ema.messages import to_stderr, write_line

if TYPE_CHECKING:
    from ddpm_ema.config import Config


def _lazy(module: str, function: str) -> Callable[[Config], object]:
    return lambda config: getattr(import_module(f"ddpm_ema.{module}"), function)(config)


def _train(config: Config) -> None:
    from ddpm_ema import score, train

    train.run(config, evaluate=score.while_training)


def _sweep(config: Config) -> object:
    sweep = config.evaluation.sweep
    if not (sweep.stds or sweep.decays or sweep.cooldowns):
        raise UserError(
            "sweep: name a range: --evaluation.sweep.stds 0.02:0.25:12, or decays or cooldowns (see --help)"
        )
    return _lazy("score", "run")(config)


@dataclass(frozen=True)
class Stage:
    """A command that takes settings; `--help` shows the sections of `first` before the others."""

    summary: str
    run: Callable[[Config], object]
    first: tuple[str, ...]


STAGES = {
    "features": Stage(
        "Train a feature classifier on the labels of the data set, for scoring.",
        _lazy("classifier_training", "train_features"),
        ("data", ""),
    ),
    "train": Stage(
        "Train a network and keep averages of its weights; go on if the run has checkpoints. --dry-run only says what it takes.",
        _train,
        ("training", "", "checkpoints", "data", "model", "diffusion", "machine"),
    ),
    "score": Stage(
        "Sample from every average with the same noise, score the samples, and say which differences are significant.",
        _lazy("score", "run"),
        ("evaluation", "evaluation.sweep", "machine"),
    ),
    "sweep": Stage(
        "Score reconstructed averages over a range of widths, beside the weights that `score` takes.",
        _sweep,
        ("evaluation.sweep", "evaluation", "machine"),
    ),
}
# Commands without settings: summary, the module with `main(arguments)`, and its options if the module is slow to import.
TOOLS: dict[str, tuple[str, str, Callable[[], Any] | None]] = {
    "report": ("Write one HTML page about a run: which weights to ship, and why.", "report", options.report),
    "export": ("Write weights of a run as a diffusers pipeline folder.", "export", options.export),
    "reconstruct": (
        "Make averages from the snapshots of a run, or plan snapshots.",
        "reconstruction",
        options.reconstruct,
    ),
    "import": ("Make a run directory from checkpoints of another program.", "importing", options.importing),
    "doctor": ("Check whether this machine or image can train.", "doctor", None),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0 done, 2 bad input, 3 diverged, 75 stopped and saved."""
    given = list(sys.argv[1:] if argv is None else argv)
    return guard(_dispatch, [word for word in given if word != "--quiet"], quiet="--quiet" in given)


def guard(function: Callable[..., Any], *args: Any, quiet: bool = False) -> int:
    """Calls `function` and returns its exit code, if it returns an int; a UserError becomes one message on stderr.

    `quiet` shows warnings and errors alone. What every rank raises, one rank of each machine prints.
    """
    to_stderr(quiet)
    try:
        try:
            result = function(*args)
        finally:
            sys.stdout.flush()
    except UserError as error:
        if not error.everywhere or os.environ.get("LOCAL_RANK", "0") == "0":
            write_line(f"{error.prefix}{error}")
        return error.exit_code
    except KeyboardInterrupt:
        write_line("stopped by SIGINT")
        return 128 + signal.SIGINT
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that nothing fails at exit
        return EXIT_DONE
    return result if isinstance(result, int) else EXIT_DONE


def _reader_is_gone() -> bool:
    """Whether stdout is a pipe that nobody reads any more, as after `| head`."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _dispatch(arguments: list[str]) -> object:
    if not arguments:
        raise UserError(f"name a command\n\n{_usage()}")
    name, *rest = arguments
    if name in ("-h", "--help"):
        print(_usage())
        return EXIT_DONE
    if name in STAGES:
        return _run_stage(name, rest)
    if name not in TOOLS:
        raise UserError(f"{name!r} is not a command{nearest(name, [*STAGES, *TOOLS])}")
    _, module, parser = TOOLS[name]
    if parser is not None:
        parser().parse_args(rest)  # answers --help and refuses wrong options before torch is imported
    return import_module(f"ddpm_ema.{module}").main(rest)


def _usage() -> str:
    lines = [f"  {name:<12} {stage.summary}" for name, stage in STAGES.items()]
    lines += [f"  {name:<12} {summary}" for name, (summary, *_) in TOOLS.items()]
    more = "ddpm-ema COMMAND --help lists the options of a command; --quiet\nis one of every command: warnings and errors alone."
    return "\n".join(["usage: ddpm-ema COMMAND ...", "", *lines, "", more])


def _run_stage(name: str, arguments: list[str]) -> object:
    try:
        from ddpm_ema import config
    except ModuleNotFoundError as error:
        raise UserError(f"{error}: pip install 'ddpm_ema[train]'") from None
    dry, flags = name == "train" and "--dry-run" in arguments, ("-h", "--help", *["--dry-run"] * (name == "train"))
    stage, given = STAGES[name], [word for word in arguments if word not in flags]
    if {"-h", "--help"} & set(arguments):
        config.show_help(f"ddpm-ema {name}", stage.summary, config.parse(given), stage.first)
        return EXIT_DONE
    try:
        settings = _settings(name, given)
    except UserError as error:
        error.everywhere = True
        raise
    return _lazy("train", "dry_run")(settings) if dry else stage.run(settings)


def _settings(name: str, arguments: list[str]) -> Config:
    from ddpm_ema import config

    run, path, overrides = config.split(arguments)
    if name not in ("train", "features") or run is not None or path is not None:
        return config.resolve(run, path, overrides)
    if "data.path" in overrides and overrides.get("data.source", ["folder"]) == ["folder"]:
        from ddpm_ema import own_folder

        return own_folder.settings(overrides)
    raise UserError(
        f"{name}: name your images with --data.path FOLDER, which chooses settings for them, or settings with --config FILE; "
        f"these come with the program:\n{_shipped()}"
    )


def _shipped() -> str:
    """The configurations that were installed, or those of this checkout."""
    folders = (Path(sys.prefix, "share", "ddpm_ema", "configs"), Path(__file__).parents[1] / "configs")
    return "\n".join(f"  {path}" for folder in folders for path in sorted(folder.glob("*.yaml")))
