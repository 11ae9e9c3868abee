"""Many samples in one picture."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from robuq_core.files import replacing

SHEET_IMAGES, SHEET_COLUMNS, SHEET_SIDE = 64, 8, 96


def contact_sheet(images: Tensor, columns: int, path: Path, gap: int = 2) -> None:
    """Write images ``[N, 3, S, S]`` in [-1, 1] as one PNG of ``columns`` columns on white."""
    size = images.shape[-1]
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (size + gap) + gap, rows * (size + gap) + gap), "white")
    pixels = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    for i, image in enumerate(pixels):
        row, column = divmod(i, columns)
        sheet.paste(Image.fromarray(image), (gap + column * (size + gap), gap + row * (size + gap)))
    with replacing(path) as temporary:
        sheet.save(temporary, format="PNG")


def write_sheet(samples: Tensor, path: Path) -> None:
    """The first 64 of ``samples [N, 3, S, S]``, small ones enlarged by whole pixels: a smooth upscale would flatter."""
    first = samples[:SHEET_IMAGES]
    contact_sheet(F.interpolate(first, scale_factor=max(1, SHEET_SIDE // first.shape[-1])), SHEET_COLUMNS, path)
