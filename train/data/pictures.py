"""One image: which formats are read, how its pixels become 8-bit RGB or grey, and how it becomes a square."""

from __future__ import annotations

import io
from contextlib import suppress
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from robuq_core.errors import UserError

Fit = Literal["resize", "adm"]

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
# Pillow looks at the content, not at the name: left to itself it would give an EPS called x.png to Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")


class DataError(UserError):
    """Data that cannot be trained on; the message names the file and the fix."""


def open_image(source: Path | bytes) -> Image.Image:
    """The image in a file or in memory, not decoded yet. Raises OSError if it is none of :data:`FORMATS`."""
    return Image.open(source if isinstance(source, Path) else io.BytesIO(source), formats=FORMATS)


def eight_bit(image: Image.Image, channels: int) -> Image.Image:
    """``image`` upright as its EXIF says, 8 bits, RGB for three ``channels`` and grey for one.

    16-bit grey is divided by 257 and rounded. Transparent pixels are composited on white: their stored colour is
    arbitrary.
    """
    with suppress(Exception):  # damaged EXIF leads Pillow to raise almost anything; the pixels may still be whole
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = _from_sixteen_bits(image)
    elif image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert("L" if channels == 1 else "RGB")


def _from_sixteen_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64).clip(0, 65535)
    grey = ((values + 128) // 257).astype(np.uint8)  # 257 = 65535 / 255
    if isinstance(hidden := image.info.get("transparency"), int):
        grey[values == hidden] = 255
    return Image.fromarray(grey)


def square(image: Image.Image, size: int, fit: Fit) -> Image.Image:
    """``resize`` takes the middle square and resizes it (Lanczos); ``adm`` halves the image by box filters while its
    short side is at least twice ``size``, resizes the short side to ``size`` (bicubic) and crops, as published ImageNet
    figures do (ADM, arXiv 2105.05233)."""
    if fit == "resize":
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        return image.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
