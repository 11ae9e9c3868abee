"""Encoded images: which formats are read, and no others; and how much a packed file can hold."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
# Most bytes that deflate makes of one.
DEFLATE_RATIO = 1032
# Pillow looks at the content, not at the name: left to itself it would give an EPS called x.png to Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")


def open_image(source: Path | bytes) -> Image.Image:
    """The image in a file or in memory, not decoded yet.

    Raises:
        OSError: it cannot be read, or is none of :data:`FORMATS`.
    """
    return Image.open(source if isinstance(source, Path) else io.BytesIO(source), formats=FORMATS)
