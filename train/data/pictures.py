"""One image: which formats are read, how its pixels become 8-bit RGB or grey, and how it becomes a square."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from robuq_core.errors import UserError

Fit = Literal["resize", "pad", "adm"]

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
# Most bytes that deflate makes of one.
DEFLATE_RATIO = 1032
# Pillow looks at the content, not at the name: left to itself it would give an EPS called x.png to Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(source: Path | bytes) -> Image.Image:
    """The image in a file or in memory, not decoded yet.

    Raises:
        OSError: it cannot be read, or is none of :data:`FORMATS`.
    """
    return Image.open(source if isinstance(source, Path) else io.BytesIO(source), formats=FORMATS)


def eight_bit(image: Image.Image, channels: int) -> Image.Image:
    """``image`` upright as its EXIF says, 8 bits, RGB for three ``channels`` and grey for one.

    16-bit grey is divided by 257 and rounded. Transparent pixels are composited on white: their stored colour is
    arbitrary.
    """
    try:
        turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF leads Pillow to raise almost anything; the pixels may still be whole
        turn = None
    if image.mode.startswith("I"):
        image = _from_sixteen_bits(image)
    elif image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    image = image.convert("L" if channels == 1 else "RGB")
    return image if turn is None else image.transpose(turn)


def _from_sixteen_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64).clip(0, 65535)
    grey = ((values + 128) // 257).astype(np.uint8)  # 257 = 65535 / 255
    if isinstance(hidden := image.info.get("transparency"), int):
        grey[values == hidden] = 255
    return Image.fromarray(grey)


class DataError(UserError):
    """Data that cannot be trained on; the message names the file and the fix."""


def square(image: Image.Image, size: int, fit: Fit) -> Image.Image:
    """``resize`` takes the middle square and resizes it (Lanczos); ``pad`` centres a smaller image on black; ``adm``
    halves the image by box filters while its short side is at least twice ``size``, resizes the short side to
    ``size`` (bicubic) and crops, as published ImageNet figures do (ADM, arXiv 2105.05233)."""
    if fit == "pad" and max(image.size) <= size:
        padded = Image.new(image.mode, (size, size))
        padded.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
        return padded
    if fit == "adm":
        return _adm_crop(image, size)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))


def _adm_crop(image: Image.Image, size: int) -> Image.Image:
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
