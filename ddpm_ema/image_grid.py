"""Draws labelled rows of images as one picture."""

import io
import json
from collections.abc import Mapping
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

from ddpm_ema.config import EvaluationSettings
from ddpm_ema.numbers import sampler_label
from ddpm_ema.rundir import atomic_write

REAL = "real images"  # the name of a row that is of the data set
GAP, TARGET, TOP = 2, 48, 24  # pixels: between images; side that small images are enlarged to; height of the title


def save_grid(path: Path, rows: Mapping[str, Tensor], step: int, settings: EvaluationSettings, note: str = "") -> None:
    """Writes the rows under a title that says how they were sampled: step of training, sampler, and a `note` behind it."""
    save_rows(path, rows, f"step {step}, {sampler_label(settings.model_dump())}{note}, the same noise in every row")


def save_rows(path: Path, rows: Mapping[str, Tensor], title: str) -> None:
    """Writes a PNG: one labelled row per name, under a title.

    Its `Title` entry repeats the title as text; its `Rows` entry says, as JSON, where the images lie, so that the report can show
    them otherwise. A row is uint8 `[n, C, H, W]`, C 1 or 3, the same H and W everywhere; REAL, if there, comes first.
    """
    sample = next(iter(rows.values()))
    scale = max(1, round(TARGET / sample.shape[-1]))
    height, width = sample.shape[-2] * scale, sample.shape[-1] * scale
    font = ImageFont.load_default(size=13)
    margin = 12 + max(int(font.getlength(name)) for name in rows)
    columns = max(len(images) for images in rows.values())
    places = {"names": list(rows), "columns": columns, "left": margin, "top": TOP, "width": width, "height": height}
    places |= {"gap": GAP, "scale": scale, "real": REAL in rows}
    total = max(margin + columns * (width + GAP), 12 + int(font.getlength(title)))
    canvas = Image.new("RGB", (total, TOP + len(rows) * (height + GAP)), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((6, 5), title, fill="black", font=font)
    for y, (name, images) in zip(range(TOP, canvas.height, height + GAP), rows.items(), strict=False):
        draw.text((6, y + height // 2 - 8), name, fill="black", font=font)
        for x, image in zip(range(margin, canvas.width, width + GAP), images, strict=False):
            canvas.paste(_picture(image).resize((width, height), Image.Resampling.NEAREST), (x, y))
    data, entries = io.BytesIO(), PngImagePlugin.PngInfo()
    entries.add_text("Title", title)
    entries.add_text("Rows", json.dumps(places))
    canvas.save(data, "PNG", pnginfo=entries)
    atomic_write(path, data.getvalue())


def _picture(image: Tensor) -> Image.Image:
    """uint8 [C, H, W] -> RGB."""
    return Image.fromarray(image.expand(3, -1, -1).permute(1, 2, 0).cpu().numpy())
