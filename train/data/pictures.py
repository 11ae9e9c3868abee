"""Encoded images: which formats are read, and how their pixels become 8-bit RGB or grey."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

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
