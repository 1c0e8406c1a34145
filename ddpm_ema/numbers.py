"""Numbers, labels and tables as people read them: one format for page, terminal and model card. No torch."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

MINUS = "\N{MINUS SIGN}"
MISSING = "\N{EN DASH}"
NOISE_PRECISION = 0.1
SATURATION_MARGIN = 0.10  # a warning where samples and reference differ by more in their share of values at 0 or 255


def decimals(error: float | None) -> int:
    """Digits after the point that show an error of this size to two significant figures; two where there is none."""
    if error is None or not 0 < error < math.inf:
        return 2
    return min(8, max(0, 1 - math.floor(math.log10(error))))


def figure(value: float | None, places: int = 2, signed: bool = False) -> str:
    """A number with a true minus sign; an en dash where it is missing; never a signed zero."""
    if value is None:
        return MISSING
    text = f"{value:+.{places}f}" if signed else f"{value:.{places}f}"
    if float(text) == 0:
        text = f"{0:.{places}f}"
    return text.replace("-", MINUS)


def with_error(value: float | None, error: float | None, signed: bool = False) -> str:
    """`12.24 \u00b1 0.91`: value and standard error, to two significant figures of the error."""
    if error is None or value is None:
        return figure(value, signed=signed)
    places = decimals(error)
    return f"{figure(value, places, signed)} \u00b1 {error:.{places}f}"


def listed(names: Sequence[str], conjunction: str = "and") -> str:
    """`a`, `a and b`, `a, b and c`; empty for no names."""
    return f" {conjunction} ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def aligned(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> list[str]:
    """Lines of a text table; the columns `left` are aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = ["<" if i in left else ">" for i in range(len(widths))]
    return [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)).rstrip()
        for row in rows
    ]


def metric_label(results: Mapping[str, Any]) -> str:
    """`FID` only where results.json says so; anything else names its extractor: `FD (classifier)`."""
    return "FID" if results.get("metric") == "fid" else f"FD ({results.get('extractor', 'unknown extractor')})"


def sampler_label(settings: Mapping[str, Any]) -> str:
    """`ddim 20 steps, eta 0.5`, of evaluation settings or results.json; clipping and guidance where they are not the default."""
    parts = [f"{settings['sampler']} {settings['num_inference_steps']} steps"]
    if settings["sampler"] == "ddim" and settings.get("eta"):
        parts.append(f"eta {settings['eta']:g}")
    if settings.get("guidance_scale") not in (None, 1):
        parts.append(f"guidance {settings['guidance_scale']:g}")
    if settings.get("clip_sample") is False:
        parts.append("x_0 not clipped")
    return ", ".join(parts)


def verdict_of(delta: float, significant: bool) -> str:
    """What a paired difference from raw means: `better`, `worse` or `not significant`. A lower distance is better."""
    return ("better" if delta < 0 else "worse") if significant else "not significant"


def reading(results: Mapping[str, Any]) -> str:
    """What the distances of a scoring are from: the images of the reference alone, or the population they are a sample of."""
    reference = results.get("reference", "an unknown reference")
    if results.get("reading") == "population":
        return f"against the population of which the reference is a sample ({reference})"
    which = "training images" if results.get("reading") == "training images" else "images"
    return f"against these {which} ({reference})"


def says_nothing(precision_of_noise: float | None) -> bool:
    """Whether images of noise reach so high a precision that it means nothing with this extractor and reference."""
    return precision_of_noise is not None and precision_of_noise >= NOISE_PRECISION


def precision_note(precision_of_noise: float | None) -> str:
    """Why precision is left out: features of noise may lie among those of the data. Empty where precision means something."""
    if precision_of_noise is None or not says_nothing(precision_of_noise):
        return ""
    return f"Precision is left out: images of uniform noise reach {precision_of_noise:.2f} of it with this extractor and reference."


def saturation(shares: Mapping[str, float | None], expected: float | None) -> str:
    """A warning where samples of some weights lie at the ends of the range of pixels far more, or far less, often than the reference.

    `shares`: by weights, of their channel values at 0 or 255; `expected`: of the reference's. Empty where all is well or unknown.
    """
    if expected is None:
        return ""
    off = {
        name: share for name, share in shares.items() if share is not None and abs(share - expected) > SATURATION_MARGIN
    }
    if not off:
        return ""
    return (
        f"Channel values at 0 or 255: {listed([f'{share:.0%} of {name}' for name, share in off.items()])}, but {expected:.0%} of the "
        "reference. The usual cause is the sampler (steps, clip_sample) or a short training; another sampler may rank weights "
        "differently."
    )
