"""Rows of images with labels, as one picture."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ddpm_ema.rundir import atomic_write

GAP, TARGET = 2, 48  # pixels between images; side that small images are enlarged to, by a whole factor


def save_grid(path: Path, rows: Mapping[str, Tensor], title: str = "") -> None:
    """Writes a PNG: one labelled row a name. rows: name -> uint8 [n, C, H, W], C 1 or 3, the same H and W everywhere."""
    sample = next(iter(rows.values()))
    scale = max(1, round(TARGET / sample.shape[-1]))
    height, width = sample.shape[-2] * scale, sample.shape[-1] * scale
    font = ImageFont.load_default(size=13)
    margin = 12 + max(int(font.getlength(name)) for name in rows)
    columns = max(len(images) for images in rows.values())
    top = 24 if title else GAP
    canvas = Image.new("RGB", (margin + columns * (width + GAP), top + len(rows) * (height + GAP)), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((6, 5), title, fill="black", font=font)
    for y, (name, images) in zip(range(top, canvas.height, height + GAP), rows.items(), strict=False):
        draw.text((6, y + height // 2 - 8), name, fill="black", font=font)
        for x, image in zip(range(margin, canvas.width, width + GAP), images, strict=False):
            canvas.paste(_picture(image).resize((width, height), Image.Resampling.NEAREST), (x, y))
    data = io.BytesIO()
    canvas.save(data, "PNG")
    atomic_write(path, data.getvalue())


def _picture(image: Tensor) -> Image.Image:
    """uint8 [C, H, W] -> RGB."""
    array = image.permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array).convert("RGB")
