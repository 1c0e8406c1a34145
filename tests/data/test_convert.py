"""Every kind of image file gives the pixels that `convert` documents: real files, written and read back."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_sets import everything, load
from PIL import Image

from ddpm_ema.data.convert import Conversion
from ddpm_ema.errors import UserError


def through_a_file(image: Image.Image, tmp_path: Path, name: str, channels: int = 3, **save: Any) -> np.ndarray:
    """uint8 [C, H, W] of an image that was written to a file and loaded as a folder of one; small ones magnified."""
    root = tmp_path / "one"
    root.mkdir()
    if image.size == (2, 2):
        pixels = through_a_file(
            image.resize((4, 4), Image.Resampling.NEAREST), tmp_path / "one", name, channels, **save
        )
        return pixels[:, ::2, ::2]
    image.save(root / name, **save)
    dataset = load(root, image_size=image.size[0], channels=channels, background=200)
    return everything(dataset)[0].numpy()


def test_grey_is_repeated_over_three_channels(tmp_path: Path) -> None:
    levels = np.arange(16, dtype=np.uint8).reshape(4, 4) * 17
    assert (through_a_file(Image.fromarray(levels), tmp_path, "x.png") == levels).all()


def test_colour_becomes_luma_in_one_channel(tmp_path: Path) -> None:
    image = Image.new("RGB", (2, 2), (255, 0, 0))
    image.putpixel((1, 0), (0, 255, 0))
    image.putpixel((0, 1), (0, 0, 255))
    image.putpixel((1, 1), (9, 9, 9))
    # ITU-R 601-2: 0.299 R + 0.587 G + 0.114 B
    assert through_a_file(image, tmp_path, "x.png", channels=1).tolist() == [[[76, 150], [29, 9]]]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_are_laid_over_the_background(tmp_path: Path, mode: str) -> None:
    def pixel(grey: int, alpha: int) -> tuple[int, ...]:
        return (grey, alpha) if mode == "LA" else (grey, grey, grey, alpha)

    image = Image.new(mode, (2, 2), pixel(40, 0))
    image.putpixel((0, 0), pixel(40, 255))
    image.putpixel((1, 0), pixel(0, 128))
    pixels = through_a_file(image, tmp_path, "x.png")
    half = round(200 * (255 - 128) / 255)
    assert pixels.shape == (3, 2, 2)
    assert np.abs(pixels.astype(int) - np.array([[40, half], [200, 200]])).max() <= 1
    assert (pixels[:, 0, 0] == 40).all()
    assert (pixels[:, 1] == 200).all()


@pytest.mark.parametrize(
    ("mode", "name", "save", "shown"),
    [
        ("P", "x.png", {}, [200, 100, 50]),
        ("P", "x.gif", {"transparency": 1}, [200, 200, 200]),
        ("RGB", "x.png", {"transparency": (200, 100, 50)}, [200, 200, 200]),
    ],
)
def test_a_palette_gives_its_colours_and_a_transparent_one_the_background(
    tmp_path: Path, mode, name, save, shown
) -> None:
    image = Image.new("P", (2, 2))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 1), 1)
    pixels = through_a_file(image if mode == "P" else image.convert(mode), tmp_path, name, **save)
    assert pixels[:, 0, 0].tolist() == [10, 20, 30]
    assert pixels[:, 1, 1].tolist() == shown


def test_cmyk_jpeg_becomes_rgb(tmp_path: Path) -> None:
    pixels = through_a_file(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), tmp_path, "x.jpg", quality=100)
    assert np.abs(pixels.astype(int) - np.array([0, 255, 255])[:, None, None]).max() <= 3


@pytest.mark.parametrize("name", ["x.png", "x.tif"])
def test_sixteen_bit_grey_is_scaled_and_rounded_to_nearest(tmp_path: Path, name: str) -> None:
    rows = [[0, 128, 129, 257], [32767, 32896, 65406, 65407], [65535, 0, 1, 2], [0, 0, 0, 385]]
    levels = np.array(rows, dtype=np.uint16)
    pixels = through_a_file(Image.fromarray(levels), tmp_path, name)
    assert (pixels == np.rint(levels / 257)).all()
    assert pixels[0, :2].tolist() == [[0, 0, 1, 1], [127, 128, 254, 255]]


def test_bilevel_is_black_and_white(tmp_path: Path) -> None:
    image = Image.new("1", (2, 2))
    image.putpixel((1, 0), 1)
    assert through_a_file(image, tmp_path, "x.png", channels=1).tolist() == [[[0, 255], [0, 0]]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    """Row and column of the stored image that show at the upper left and the upper right, by the EXIF standard."""
    shown = {1: (0, 1), 2: (1, 0), 3: (3, 2), 4: (2, 3), 5: (0, 2), 6: (2, 0), 7: (3, 1), 8: (1, 3)}[orientation]
    stored = [10, 80, 150, 220]  # upper left, upper right, lower left, lower right
    image = Image.new("L", (16, 16))
    for corner, level in enumerate(stored):
        image.paste(level, (8 * (corner % 2), 8 * (corner // 2), 8 * (corner % 2) + 8, 8 * (corner // 2) + 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = through_a_file(image, tmp_path, "x.jpg", channels=1, exif=exif, quality=100)[0].astype(int)
    assert abs(pixels[2, 2] - stored[shown[0]]) < 4
    assert abs(pixels[2, 13] - stored[shown[1]]) < 4


def test_the_first_frame_of_an_animation_is_taken(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    pixels = through_a_file(frames[0], tmp_path, "x.gif", save_all=True, append_images=frames[1:])
    assert pixels[:, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.fromarray(np.full((4, 4), 0.5, np.float32)), "floating-point pixels"),
        (Image.fromarray(np.full((4, 4), 70_000, np.int32)), "not 16-bit grey"),
    ],
)
def test_pixels_of_no_defined_range_are_refused(tmp_path: Path, image: Image.Image, message: str) -> None:
    with pytest.raises(UserError, match=f"x.tif: .*{message}"):
        through_a_file(image, tmp_path, "x.tif")


def test_the_centre_square_is_taken() -> None:
    image = Image.new("L", (9, 4), 255)
    image.paste(7, (2, 0, 6, 4))
    assert (Conversion(4, 1)(image) == 7).all()
    assert (Conversion(4, 1)(image.transpose(Image.Transpose.TRANSPOSE)) == 7).all()


def test_shrinking_is_antialiased_and_keeps_the_mean() -> None:
    fine = np.indices((64, 64)).sum(0) % 2 * np.uint8(255)
    small = Conversion(8, 1)(fine.astype(np.uint8))
    assert np.abs(small.astype(float) - 127.5).max() < 3  # without antialiasing: all black or all white


def test_an_image_of_the_right_size_keeps_its_pixels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    assert (Conversion(5, 3)(pixels) == pixels.transpose(2, 0, 1)).all()
