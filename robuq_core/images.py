"""Images with their settings as PNG, JPEG and WebP files. Deterministic: equal input gives equal bytes.

A file without settings, or of another format, raises UserError.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import robuq_core
from robuq_core.errors import UserError
from robuq_core.params import RowSpec

if TYPE_CHECKING:
    import numpy as np

ImageFormat = Literal["png", "jpeg", "webp"]
IMAGE_FORMATS: tuple[ImageFormat, ...] = ("png", "jpeg", "webp")

# Full-resolution chroma: at the sizes of DiTs, subsampled colour is visible.
_OPTIONS: dict[ImageFormat, dict[str, Any]] = {
    "png": {"compress_level": 6},
    "jpeg": {"quality": 95, "subsampling": 0},
    "webp": {"quality": 95, "method": 4},
}
# Keyword of the PNG text chunk. JPEG and WebP have the same JSON in the EXIF field UserComment.
KEYWORD = "robuq"
# EXIF 2.32, 4.6.5: a comment begins with the name of its character code.
_ASCII = b"ASCII\0\0\0"
_MAX_SETTINGS = 65_536


def image_settings(spec: RowSpec, checkpoint: str, class_name: str | None = None) -> dict[str, Any]:
    """The settings to store in the file of one image, enough to generate it again.

    Args:
        checkpoint: name of the packed file without suffix.
        class_name: None for a model without classes, whose ``class_id`` is stored as None too.
    """
    settings = {"version": robuq_core.__version__, "checkpoint": checkpoint, "class_name": class_name, **vars(spec)}
    return settings if class_name is not None else settings | {"class_id": None}


def encode_image(pixels: np.ndarray, image_format: ImageFormat, settings: Mapping[str, Any] | None = None) -> bytes:
    """Encode uint8 ``[H, W, 3]`` as a file of ``image_format`` with ``settings``, if given."""
    # Imported late: the HTTP process of the server encodes nothing, and starts faster without.
    from PIL import ExifTags, Image, PngImagePlugin

    options = dict(_OPTIONS[image_format])
    if settings is not None:
        text = json.dumps(settings)  # ASCII
        if image_format == "png":
            options["pnginfo"] = info = PngImagePlugin.PngInfo()
            info.add_text(KEYWORD, text)
        else:
            options["exif"] = exif = Image.Exif()
            exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = _ASCII + text.encode()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=image_format, **options)
    return buffer.getvalue()


def read_settings(image: Path | bytes) -> dict[str, Any]:
    """The settings that :func:`encode_image` stored in a file or its content. Pixels are not decoded."""
    from PIL import ExifTags, Image

    name = str(image) if isinstance(image, Path) else "image"
    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image, formats=IMAGE_FORMATS) as opened:
            if opened.format == "PNG":
                stored = opened.info.get(KEYWORD)
            else:
                comment = opened.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment, b"")
                stored = comment.removeprefix(_ASCII) if isinstance(comment, bytes) else None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read {name}: {error}; give a PNG, JPEG or WebP file") from error
    try:
        settings = json.loads(stored) if stored and len(stored) <= _MAX_SETTINGS else None
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict) or "checkpoint" not in settings:
        raise UserError(f"{name} has no RobuQ settings; give the original file, since editors and web sites often "
                        "remove them")  # fmt: skip
    return settings
