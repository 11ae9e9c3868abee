"""Pixels to files. Deterministic: equal pixels give equal bytes."""

from __future__ import annotations

import io
from typing import Any, Literal

import numpy as np
from PIL import Image

ImageFormat = Literal["png", "jpeg", "webp"]
IMAGE_FORMATS: tuple[ImageFormat, ...] = ("png", "jpeg", "webp")

# Full-resolution chroma: at the sizes that DiTs draw, subsampled colour is visible.
_OPTIONS: dict[ImageFormat, dict[str, Any]] = {
    "png": {"compress_level": 6},
    "jpeg": {"quality": 95, "subsampling": 0},
    "webp": {"quality": 95, "method": 4},
}


def encode_image(pixels: np.ndarray, image_format: ImageFormat) -> bytes:
    """Encode uint8 ``[H, W, 3]`` as a file of ``image_format``."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=image_format, **_OPTIONS[image_format])
    return buffer.getvalue()
