"""Command line → settings, and errors → exit codes. What every script under `scripts/` calls."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ddpm_ema import config as settings
from ddpm_ema.errors import EXIT_DONE, UserError
from ddpm_ema.messages import to_stderr


def guard(function: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Calls `function`; an error a person can cause becomes one message on stderr and its exit code."""
    to_stderr()
    try:
        function(*args, **kwargs)
    except UserError as error:
        print(f"{error.prefix}{error}", file=sys.stderr, flush=True)
        return error.exit_code
    return EXIT_DONE


def main(run: Callable[[settings.Config], Any], description: str, argv: Sequence[str] | None = None) -> int:
    """Parses `--config FILE --section.setting value ...`, calls `run(config)` and returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return guard(lambda: run(parse(arguments, description)))


def parse(arguments: Sequence[str], description: str) -> settings.Config:
    """`--config FILE` and dotted overrides -> settings. Raises UserError that lists every error; `--help` ends the program.

    Overrides are laid over the file before one validation sees the whole, so that errors of both come at once; tyro, which
    stops at its first, renders the help.
    """
    wants_help = any(a in ("-h", "--help") for a in arguments)
    path, overrides = split([a for a in arguments if a not in ("-h", "--help")])
    config = settings.load(path, overrides)
    if wants_help:
        _print_help(config, description)
    return config


def split(arguments: Sequence[str]) -> tuple[str | None, dict[str, list[str]]]:
    """["--config", "a.yaml", "--training.steps", "5"] -> ("a.yaml", {"training.steps": ["5"]}). Both `--a b` and `--a=b`."""
    overrides: dict[str, list[str]] = {}
    current: list[str] | None = None
    stray: list[str] = []
    for argument in arguments:
        if argument.startswith("--"):
            key, equals, value = argument[2:].partition("=")
            name = key if key.startswith("averages.") else key.replace("-", "_")
            key, switched_off = _positive(name)
            current = overrides[key] = ["false"] if switched_off else [value] if equals else []
        elif current is None:
            stray.append(argument)
        else:
            current.append(argument)
    if stray:
        raise UserError(
            f"{stray[0]!r}: not a setting; write --config FILE or --section.setting value (--help lists them)"
        )
    paths = overrides.pop("config", [])
    if len(paths) > 1 or (not paths and "config" in overrides):
        raise UserError("--config: takes one file")
    return (paths[0] if paths else None), overrides


def _positive(key: str) -> tuple[str, bool]:
    """tyro's switches: "training.no_compile" -> ("training.compile", True)."""
    section, dot, name = key.rpartition(".")
    return f"{section}{dot}{name.removeprefix('no_')}", name.startswith("no_")


def _print_help(config: settings.Config, description: str) -> None:
    """tyro lists every setting with its meaning and the value the file gives it."""
    import tyro
    from pydantic import create_model

    # tyro needs one type an option; an average is shown as the profile it is.
    shown = create_model("Config", __base__=settings.Config, averages=(dict[str, str], {}))
    profiles = {name: str(profile) for name, profile in config.averages.items()}
    default = shown.model_construct(**{**dict(config), "averages": profiles})
    text = f"{description}\n\n--config FILE names the settings; the options below override it."
    program = os.path.basename(sys.argv[0])
    tyro.cli(shown, default=default, args=["--help"], prog=program, description=text, use_underscores=True)
