"""Grids of samples, taken apart: one picture per set of weights, so that the page can show them at the same place."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from ddpm_ema.report.reading import picture
from ddpm_ema.report.record import Record, Scoring

MAX_BYTES = 24 * 2**20  # a larger page no longer opens well on a phone
LINE = 8  # images side by side
Size = Annotated[int, Field(ge=1, le=2**14)]
Offset = Annotated[int, Field(ge=0, le=2**14)]


class Picture(NamedTuple):
    """`near`: of the training images nearest to its images, if known; its name says by which distance."""

    name: str
    uri: str
    width: int
    height: int
    near: Picture | None = None


class Gallery(NamedTuple):
    """The same images of several weights, and real ones. `whole`: a grid that does not say where its rows lie, as it is."""

    title: str
    pictures: tuple[Picture, ...]
    real: Picture | None = None
    whole: bool = False

    @property
    def size(self) -> int:
        """Bytes of the page."""
        return sum(len(one.uri) + len(one.near.uri if one.near else "") for one in self.pictures)


class Rows(BaseModel):
    """Where image_grid.py laid the images: `names` from top to bottom, `columns` of images that were enlarged by `scale`.

    `real`: whether the first row is of the data set.
    """

    model_config = ConfigDict(strict=True)
    names: Annotated[list[str], Field(min_length=1, max_length=1000)]
    columns: Annotated[int, Field(ge=1, le=1000)]
    left: Offset
    top: Offset
    width: Size
    height: Size
    gap: Offset
    scale: Size
    real: bool = False

    def cut(self, image: Image.Image) -> Iterator[tuple[str, Image.Image]]:
        """Name and images of each row, in lines of LINE, at their own size, with a transparent pixel between them.

        Raises ValueError for rows outside the picture.
        """
        right, bottom = self.columns * (self.width + self.gap), len(self.names) * (self.height + self.gap)
        if self.left + right > image.width or self.top + bottom > image.height:
            raise ValueError("rows outside the picture")
        width, height = max(1, self.width // self.scale), max(1, self.height // self.scale)
        size = (min(LINE, self.columns) * (width + 1) - 1, -(-self.columns // LINE) * (height + 1) - 1)
        for row, name in enumerate(self.names):
            sheet = Image.new("RGBA", size)
            for column in range(self.columns):
                x, y = self.left + column * (self.width + self.gap), self.top + row * (self.height + self.gap)
                part = image.resize((width, height), Image.Resampling.NEAREST, (x, y, x + self.width, y + self.height))
                sheet.paste(part, (column % LINE * (width + 1), column // LINE * (height + 1)))
            yield name, sheet


def galleries(record: Record, scorings: Sequence[Scoring]) -> list[Gallery]:
    """The scorings' grids, then the last, middle and first grid of training, as far as the page's size allows.

    The picture says how a grid of training was sampled: the settings may have changed since, and previews take fewer steps.
    """
    wanted: list[tuple[Path, str, Scoring | None]] = [
        (s.grid, f"Scored at step {s.step:,}: {s.sampling}", s) for s in scorings if s.grid is not None
    ]
    grids = record.sample_grids
    chosen = sorted({0, len(grids) // 2, len(grids) - 1} if grids else (), reverse=True)
    wanted += [(grids[i][1], "", None) for i in chosen]
    found, size = [], 0
    for path, title, scoring in wanted:
        if (image := picture(record, path)) is None:
            continue
        title = title or f"While training: {image.info.get('Title') or path.stem}"
        full = _gallery(image, title, partial(_nearest, record, scoring))
        bare = full._replace(pictures=tuple(one._replace(near=None) for one in full.pictures))
        shown = [one for one in (full, bare) if size + one.size <= MAX_BYTES][:1]
        found += shown
        size += sum(one.size for one in shown)
        if full not in shown:
            what = "" if not shown else "what lies nearest to the samples of "
            record.problems.append(f"{what}{path.relative_to(record.path)} was left out: the page would be too large")
    real = next((gallery.real for gallery in found if gallery.real), None)  # a scoring's grid has none of its own
    return [gallery if gallery.real or gallery.whole else gallery._replace(real=real) for gallery in found]


def _nearest(record: Record, scoring: Scoring | None, name: str, count: int) -> Picture | None:
    """The training images nearest to the `count` samples of these weights, where the scoring kept them."""
    key = next((row.weights_sha256 for row in scoring.entries if row.weights == name), "") if scoring else ""
    if scoring is None or not key:
        return None
    path = record.path / "scores" / scoring.folder / "nearest" / f"{key[:16]}-{count}.png"
    image = picture(record, path) if path.exists() else None
    if image is None:
        return None
    return _gallery(image, "").pictures[0]._replace(name=image.info.get("Title") or "Nearest training images")


def _gallery(
    image: Image.Image, title: str, nearest: Callable[[str, int], Picture | None] = lambda name, count: None
) -> Gallery:
    try:
        rows = Rows.model_validate_json(image.info.get("Rows", ""))
        pictures = [
            _picture(name, sheet)._replace(near=nearest(name, rows.columns))
            for name, sheet in rows.cut(image.convert("RGB"))
        ]
        return Gallery(title, tuple(pictures[rows.real :]), pictures[0] if rows.real else None)
    except ValueError:
        return Gallery(title, (_picture("", image),), whole=True)


def _picture(name: str, image: Image.Image) -> Picture:
    """Encoded anew: of the file, the page holds the pixels and nothing else."""
    pixels, data = image.convert("RGBA"), io.BytesIO()
    pixels.info = {}  # a colour profile would be written again
    pixels.save(data, "PNG", optimize=True)
    return Picture(name, "data:image/png;base64," + base64.b64encode(data.getvalue()).decode(), *image.size)
