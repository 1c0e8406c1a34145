"""A profile as a person writes it on a command line."""

import contextlib
from typing import Any

from ddpm_ema.averaging.profiles import Profile, profile_from_dict
from ddpm_ema.errors import UserError, explained
from ddpm_ema.weight_names import profile_named


def parse_target(text: str, option: str = "--target") -> Profile:
    """`power_function:std=0.075`, `swa:start=1000,every=100`, or a name such as `power_0_075` or `uniform` -> a profile.

    Raises UserError that names the option and the field, or the nearest kind.
    """
    kind, _, fields = text.partition(":")
    values: dict[str, Any] = profile_named(text) or {"kind": kind}
    for field in filter(None, fields.split(",")):
        key, equals, value = field.partition("=")
        if not equals:
            raise UserError(
                f"{option} {text}: {field!r} is not FIELD=VALUE; write for example power_function:std=0.075"
            )
        values[key.strip()] = _number(value, f"{option} {text}")
    with explained(f"{option} {text}: ", ValueError):
        return profile_from_dict(values)


def _number(value: str, where: str) -> int | float:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(value)
    raise UserError(f"{where}: {value!r} is not a number")
