"""Which settings two runs or scorings must agree on: lists that are derived from the `Effect` of each setting."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ddpm_ema.config.settings import SETTINGS, Effect


def effects() -> Iterator[tuple[str, Effect]]:
    """Key path and mark of every setting."""
    for key, field in SETTINGS.items():
        (mark,) = (found for found in field.metadata if isinstance(found, Effect))
        yield key, mark


def chosen(tree: Mapping[str, Any], marks: Callable[[Effect], object]) -> dict[str, Any]:
    """Key path -> value of the settings with one of these `marks`, if they are in these plain objects (of `to_dict`)."""
    found = {}
    for key in (key for key, mark in effects() if marks(mark)):
        value: Any = tree
        for name in key.split("."):
            value = value.get(name, _ABSENT) if isinstance(value, Mapping) else _ABSENT
        if value is not _ABSENT:
            found[key] = value
    return found


_ABSENT = object()


def differing(was: Mapping[str, Any], now: Mapping[str, Any], mark: Effect) -> list[tuple[str, Any, Any]]:
    """(key path, before, after) of the settings with this `mark` that are in both, with different values."""
    before, after = (chosen(tree, lambda found: mark in found) for tree in (was, now))
    return [(key, before[key], after[key]) for key in after if key in before and before[key] != after[key]]
