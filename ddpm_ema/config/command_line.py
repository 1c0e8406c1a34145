"""The command line of a stage: `[RUN] [--config FILE] [--section.setting VALUE ...]` → settings, and the settings → `--help`."""

import json
import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from ddpm_ema.config.agreement import chosen
from ddpm_ema.config.loading import load, require_named, to_dict
from ddpm_ema.config.settings import INTERVAL, Config, sections
from ddpm_ema.errors import UserError, nearest

WORDS = {int: "INT", float: "FLOAT", bool: "true | false", str: "TEXT", Path: "PATH"}
SIGNS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}


def parse(arguments: Sequence[str]) -> Config:
    """The settings that a command line names.

    RUN takes config.yaml of that run directory, where it lies now; --config takes another file; the other options override the file.
    Raises UserError that lists every bad setting, of the file and of the command line.
    """
    return resolve(*split(arguments))


def resolve(run: str | None, path: str | None, overrides: Mapping[str, list[str]]) -> Config:
    """The settings of a command line that was `split`. Raises UserError as `parse` does."""
    if run is None or path is not None:
        return load(path, overrides, output_dir=run)
    kept = Path(run, "config.yaml")
    if not kept.is_file():
        if Path(run).exists():
            why = "it holds no config.yaml; name settings with --config FILE, or a folder of images with --data.path"
            raise UserError(f"{run}: no run directory: {why}")
        runs = sorted(path.parent.name for path in Path(run).parent.glob("*/config.yaml"))
        hint = nearest(Path(run).name, runs)
        raise UserError(f"{run}: no such run directory; name one, or settings with --config FILE{hint}")
    return require_named(load(kept, overrides, output_dir=run), " ".join(overrides.get("model.factory", [])), kept)


def split(arguments: Sequence[str]) -> tuple[str | None, str | None, dict[str, list[str]]]:
    """Reads `--a b`, `--a=b`, `--a b c` (a list) and `--a` (true): RUN, the file of --config, and overrides by key path.

    Raises UserError for a word that belongs to no option, or where not one file stands after --config.
    """
    overrides: dict[str, list[str]] = {}
    current: list[str] = []
    words = current
    for argument in arguments:
        if argument.startswith("--"):
            key, equals, value = argument[2:].partition("=")
            key = key if key.startswith("averages.") else key.replace("-", "_")
            current = overrides[key] = [value] if equals else []
        else:
            current.append(argument)
    if words and words[0].startswith(("-", "\N{EN DASH}", "\N{EM DASH}")):
        raise UserError(f"{words[0]!r}: a setting begins with two hyphens, --section.setting; see --help")
    if len(words) > 1:
        raise UserError(f"{words[1]!r}: not a setting; write RUN, --config FILE or --section.setting value; see --help")
    paths = overrides.pop("config", None)
    if paths is not None and len(paths) != 1:
        raise UserError(f"--config: takes one file, not {' '.join(paths) or 'none'}")
    return (words[0] if words else None), (paths[0] if paths else None), overrides


def show_help(program: str, summary: str, config: Config, first: Sequence[str] = ()) -> None:
    """Prints every setting with its type, its meaning, its default, and its value where that differs; sections of `first` first."""
    width = min(120, shutil.get_terminal_size().columns)
    values, defaults = flat(config), flat(Config())
    print(f"usage: {program} [RUN] [--config FILE] [--section.setting VALUE ...]\n\n{summary}\n")
    print("  RUN            a run directory, whose config.yaml has the settings")
    print("  --config FILE  settings (YAML)\n\nThe options below override the file; a list is several values.")
    print("SHARE% is a share of training.steps, such as 5%.")
    for path, about, own in sorted(sections(), key=lambda found: ([*first, found[0]]).index(found[0])):
        print(f"\n{path or 'run'}: {about}")
        for key, field in own.items():
            here = f"; here: {written(values[key])}" if values[key] != defaults[key] else ""
            text = f"{' '.join(str(field.description).split())} (default: {written(defaults[key])}{here})"
            print(f"  --{key} {kind(field.annotation, field.metadata)}")
            print(textwrap.fill(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6))


def flat(config: Config) -> dict[str, Any]:
    """Plain values by key path."""
    return chosen(to_dict(config), lambda _: True)


def kind(of: Any, metadata: Iterable[Any] = ()) -> str:
    """What may be written for a type: `INT > 0 ...` is a list of positive whole numbers."""
    inner, metadata = get_args(of), list(metadata)
    if INTERVAL in metadata:
        return f"{kind(of, [one for one in metadata if one != INTERVAL])} | SHARE%"
    if get_origin(of) is Annotated:
        return kind(inner[0], inner[1:])
    if get_origin(of) is Literal:
        return " | ".join(map(str, inner))
    if get_origin(of) is dict:
        return "{NAME: PROFILE}"
    if get_origin(of) is tuple:
        return " ".join("..." if one is Ellipsis else kind(one) for one in inner)
    if inner:
        return " | ".join(kind(one) for one in inner if one is not type(None))
    limits = [limit for one in metadata for limit in getattr(one, "metadata", [one])]
    bounds = (
        f" {sign} {getattr(limit, name)}" for limit in limits for name, sign in SIGNS.items() if hasattr(limit, name)
    )
    return WORDS[of] + "".join(bounds)


def written(value: Any) -> str:
    """A plain value as the command line takes it."""
    if isinstance(value, list):
        return " ".join(map(written, value)) or "empty"
    return value if isinstance(value, str) else json.dumps(value)
