"""What becomes of an image: any mode, size and orientation to uint8 `[C, size, size]`.

In this order:

1. EXIF orientation is applied. Of an animation or a multi-page file the first frame is taken. ICC profiles are ignored.
2. 16-bit grey (`I;16`, `I` within 0..65535) is scaled by 255/65535 and rounded to nearest. 16-bit colour, which Pillow
   reads as 8-bit, has lost its low byte there. Floating-point pixels have no defined range and are refused.
3. Anything transparent (alpha channel, or a transparent colour or palette entry) is laid over `background`.
4. Palette, bilevel, CMYK, YCbCr and HSV become RGB by Pillow's formulas, and LAB where it can (else it is refused); for
   one channel colours become grey by ITU-R 601-2 luma; for three channels grey is repeated.
5. The largest centred square is cut out (rounded towards the upper left) and resized with antialiasing (Pillow's
   bicubic, whose support grows with the reduction). A square of the right size keeps its pixels.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

VERSION = 1  # part of every fingerprint: raise it when the pixels that come out change

_ALPHA_MODES = ("LA", "PA", "RGBA", "La", "RGBa")
_SIXTEEN_BIT_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")


@dataclass(frozen=True)
class Conversion:
    """The settings of a conversion; calling it converts one image."""

    size: int
    channels: int
    background: int = 255

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.size, self.size

    def __call__(self, image: Image.Image | npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """uint8 `[C, size, size]` of a Pillow image or a uint8 array `[H, W]` or `[H, W, C]`.

        Raises ValueError for pixels of no defined range, and whatever Pillow raises for a file it cannot read.
        """
        image = _square(self._flatten(_as_image(image)), self.size)
        pixels: npt.NDArray[np.uint8] = np.asarray(image)
        return pixels[None] if self.channels == 1 else pixels.transpose(2, 0, 1)

    def _flatten(self, image: Image.Image) -> Image.Image:
        """Mode "L" for one channel, "RGB" for three, with nothing left transparent."""
        if image.mode in _SIXTEEN_BIT_MODES:
            image = _eight_bit(image)
        elif image.mode == "F":
            raise ValueError("floating-point pixels have no defined range")
        if image.mode in _ALPHA_MODES or "transparency" in image.info:
            below = Image.new("RGBA", image.size, (self.background, self.background, self.background, 255))
            image = Image.alpha_composite(below, image.convert("RGBA"))
        wanted = "L" if self.channels == 1 else "RGB"
        if image.mode not in ("L", "RGB"):
            image = image.convert("RGB")  # Pillow has no direct way from some modes to "L"
        return image if image.mode == wanted else image.convert(wanted)


def _as_image(image: Image.Image | npt.NDArray[np.uint8]) -> Image.Image:
    if isinstance(image, Image.Image):
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return image
    if image.dtype != np.uint8:
        raise ValueError(f"pixels of type {image.dtype} have no defined range; uint8 is expected")
    return Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image)


def _eight_bit(image: Image.Image) -> Image.Image:
    levels = np.asarray(image).astype(np.int64)
    if levels.size and not 0 <= levels.min() <= levels.max() <= 0xFFFF:
        raise ValueError(f"integer pixels from {levels.min()} to {levels.max()} are not 16-bit grey")
    return Image.fromarray(((levels * 255 + 0x7FFF) // 0xFFFF).astype(np.uint8))


def _square(image: Image.Image, size: int) -> Image.Image:
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    box = (left, top, left + side, top + side)
    if side == size:
        return image if width == height else image.crop(box)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)
