"""A YAML file and overrides of the command line → `Config`: one validation of the whole, all errors at once.

Every error has its key path, the nearest name, and the place its value came from.
"""

import hashlib
import json
import re
import reprlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import ValidationError

from ddpm_ema.config.settings import SETTINGS, Config
from ddpm_ema.errors import UserError, nearest

# Limits of a file or command line: far more than settings need, and few enough that an error message takes under a second.
MOST_CHARACTERS, MOST_VALUES, MOST_LEVELS, MOST_LINES, LONGEST_LINE = 100_000, 10_000, 20, 40, 800


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but `1e-3` is a number, dates, `no` and `on` are words, and a repeated key is an error.

    Before any object is built, it refuses what would take long or not end: aliases that multiply, deep nesting, long numbers.
    """

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            values, levels = _extent(node, {})
            if values > MOST_VALUES:
                raise _refusal(node, f"more than {MOST_VALUES:,} values once its aliases are written out")
            if levels > MOST_LEVELS:
                raise _refusal(node, f"nested too deeply: more than {MOST_LEVELS} levels")
        return node


def _extent(node: yaml.Node, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """(values, levels) of a node with every alias written out; a node inside itself has no end."""
    if id(node) not in known:
        known[id(node)] = (MOST_VALUES + 1, 1)
        inner = [child for pair in node.value for child in pair] if isinstance(node, yaml.MappingNode) else node.value
        inner = [_extent(child, known) for child in inner] if isinstance(node, yaml.CollectionNode) else []
        known[id(node)] = 1 + sum(n for n, _ in inner), 1 + max((levels for _, levels in inner), default=0)
    return known[id(node)]


def _refusal(node: yaml.Node, what: str) -> UserError:
    return UserError(f"{node.start_mark.name}, line {node.start_mark.line + 1}: {what}")


def _mapping_without_repeats(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise _refusal(key, "a key must be a word")
        if key.value in seen:
            raise _refusal(key, f"{key.value!r} is repeated; keep one")
        seen.add(key.value)
    return loader.construct_mapping(node, deep=True)


def _whole_number(loader: _Loader, node: yaml.ScalarNode) -> int:
    if len(node.value) > 64 or abs(value := int(loader.construct_yaml_int(node))) >= 2**63:
        raise _refusal(node, f"{_shown(node.value)} has more than 63 bits")
    return value


# YAML 1.1 takes 3:9:3 for a number of base 60, here a range, and `no` for false, here a precision.
_WORDS = {f"tag:yaml.org,2002:{kind}" for kind in ("timestamp", "int", "float", "bool")}
_Loader.yaml_implicit_resolvers = {
    first: [found for found in resolvers if found[0] not in _WORDS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(?:true|false)$", re.IGNORECASE), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"^[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|0|[1-9][0-9_]*)$"),
    list("-+0123456789"),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.[0-9_]+(?:[eE][-+]?[0-9]+)?|\.inf)$"
        r"|^\.nan$",
        re.IGNORECASE,
    ),
    list("-+0123456789."),
)
_Loader.add_constructor("tag:yaml.org,2002:map", _mapping_without_repeats)
_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)


def _parse(text: str, where: str) -> Any:
    """YAML -> plain objects; `where` names it in the message."""
    try:
        loader = _Loader(text)
        loader.name = where
        return loader.get_single_data()
    except RecursionError:
        raise UserError(f"{where}: nested too deeply: more than {MOST_LEVELS} levels") from None
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not YAML: {' '.join(str(error).split())[:LONGEST_LINE]}") from None
    except (ValueError, KeyError, AttributeError) as error:  # what PyYAML makes of an odd !!tag
        raise UserError(f"{where}: a value cannot be read ({_shown(error)})") from None


def _shown(value: Any) -> str:
    """`repr`, cut short whatever it holds."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 80
    short.maxlevel, short.maxlist, short.maxtuple, short.maxdict = 3, 8, 8, 8
    return short.repr(value)


def load(
    path: Path | str | dict[str, Any] | None,
    overrides: Mapping[str, list[str]] | None = None,
    output_dir: Path | str | None = None,
) -> Config:
    """Reads a file of settings and lays overrides over it.

    Args:
        path: the YAML file, or what it would hold, which is changed in place; None means the defaults.
        overrides: tokens by key path, such as {"training.steps": ["500"]}. Several tokens make a list. Texts and paths stand as they
            are, other tokens are read as YAML: `1e-3` is a number. `null` is none.
        output_dir: takes the place of the file's `output_dir`.

    Raises:
        UserError: the file cannot be read, or settings are bad; the message lists all of them.
    """
    tree: Any = path if isinstance(path, dict) else {}
    if isinstance(path, Path | str):
        try:
            with open(path, encoding="utf-8") as file:
                text = file.read(MOST_CHARACTERS + 1)
        except FileNotFoundError:
            beside = sorted(found.name for found in Path(path).parent.glob("*.y*ml"))
            raise UserError(f"--config {path}: no such file{nearest(Path(path).name, beside, or_all=False)}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--config {path}: {getattr(error, 'strerror', None) or 'not a text file'}") from None
        if len(text) > MOST_CHARACTERS:
            raise UserError(f"--config {path}: more than {MOST_CHARACTERS:,} characters are no settings")
        tree = _parse(text, str(path)) or {}
        if not isinstance(tree, dict):
            raise UserError(f"{path}: must be a mapping of sections, not {type(tree).__name__}")
    if output_dir is not None:
        tree["output_dir"] = str(output_dir)
    for key, tokens in (overrides or {}).items():
        _set(tree, key, [_value(key, token) for token in tokens])
    return validate(tree, str(path) if isinstance(path, Path | str) else "settings", overrides or ())


def _value(key: str, token: str) -> Any:
    if key in SETTINGS and _is_text(SETTINGS[key].annotation):
        return None if token in ("", "null") else token
    return _parse(token, f"--{key}")


def _is_text(of: Any) -> bool:
    """Whether a type is that of texts or paths, or of several, as YAML would read `2024`, `a: b` and `a #1` otherwise."""
    return of in (str, Path) or (get_origin(of) is not dict and any(map(_is_text, get_args(of))))


def _set(tree: dict[str, Any], key: str, values: list[Any]) -> None:
    """Lays one override into the tree, in place."""
    *parents, leaf = key.split(".")
    node = tree
    for name in parents:
        node = node.setdefault(name, {})
        if not isinstance(node, dict):
            raise UserError(f"--{key}: {name} is a value, not a section")
    is_list = key in SETTINGS and "tuple" in str(SETTINGS[key].annotation)
    single = len(values) == 1 and not (is_list and not isinstance(values[0], list) and values[0] not in ("last", "all"))
    node[leaf] = (values[0] if single else values) if values else True


def validate(tree: Mapping[str, Any], where: str = "settings", overrides: Collection[str] = ()) -> Config:
    """Plain objects, of a file called `where` -> Config. Raises UserError, one message with every bad setting.

    `overrides` are key paths of the values that came from the command line.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        sources: dict[str, list[str]] = {where: [], "command line": []}
        for key, text in (found for problem in error.errors() for found in _explain(problem)):
            source = "command line" if any(_concerns(override, key, text) for override in overrides) else where
            sources[source].append(f"  {key}: {text}" if key else f"  {text}")
        raise UserError("\n".join(_listed(source, lines) for source, lines in sources.items() if lines)) from None


def _concerns(override: str, key: str, text: str) -> bool:
    """Whether an error at `key` is about the value of an override: of the same setting, or one that the text names."""
    if key == override or key.startswith(f"{override}.") or override.startswith(f"{key}."):
        return True
    return "." in override and override in text


def _listed(source: str, lines: list[str]) -> str:
    shown = [line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]}..." for line in lines[:MOST_LINES]]
    more = [f"  and {len(lines) - MOST_LINES} more"] if len(lines) > MOST_LINES else []
    return "\n".join([f"{source}: {len(lines)} bad setting{'s' if len(lines) > 1 else ''}", *shown, *more])


def _explain(problem: Any) -> Iterator[tuple[str, str]]:
    """One pydantic error -> (key path, what was expected and what was given)."""
    ours = [str(part)[:80] for part in problem["loc"]]
    path = [part for part in ours if not part.startswith(("[key]", "tuple[", "literal["))]  # these are pydantic's own
    key, message, got = ".".join(path), problem["msg"].removeprefix("Value error, "), problem["input"]
    section, _, name = key.rpartition(".")
    if path == [key] and key in SETTINGS and section:
        yield key, f"in a file write {name} below its section, {section}"
    elif problem["type"] == "extra_forbidden":
        yield key, f"unknown setting{nearest(path[-1], _siblings(path))}"
    elif problem["type"] == "value_error":
        for line in message.split("\n"):
            first, _, rest = line.partition(": ")
            yield (key, line) if key else (first, rest)
    elif problem["type"] == "model_type":
        yield key, f"is a section: write its settings below it, or leave it out (got {_shown(got)})"
    else:
        known = re.findall(r"'([^']+)'", message) if problem["type"] == "literal_error" else ()
        near = nearest(got, known, or_all=False)
        yield key, f"{message[0].lower()}{message[1:]}{near} (got {_shown(got)})"


def _siblings(path: list[str]) -> list[str]:
    """Names that are allowed where `path` ends; or, if other sections have a setting of that name, its key paths there."""
    elsewhere = [key for key in SETTINGS if f".{key}".endswith(f".{path[-1]}")]
    start = "".join(f"{name}." for name in path[:-1])
    return elsewhere or list(
        dict.fromkeys(key[len(start) :].split(".")[0] for key in SETTINGS if key.startswith(start))
    )


def require_named(config: Config, factory: str | None, where: object) -> Config:
    """Returns settings that a run directory, perhaps a stranger's, holds at `where`: code that they name must not run by that alone.

    Raises UserError unless the network is the U-Net, or the user's `factory` repeats theirs.
    """
    if (named := config.model.factory) not in (None, factory):
        cure = f"if you trust that code, name it: --model.factory {named}"
        raise UserError(f"{where}: its network comes from {named}, Python code that would run here; {cure}")
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """Plain JSON- and YAML-able objects that `validate` takes back."""
    return config.model_dump(mode="json")


def to_yaml(config: Config) -> str:
    """The resolved settings as a file."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def digest(value: Any) -> str:
    """Twelve hex digits of the sha256 of plain objects, keys sorted: names a set of settings."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
