"""Latents of a local SD-VAE folder: what a latent diffusion transformer trains on instead of pixels.

Kept are the mean and the deviation of the encoder's normal, for each image and for its mirror image. A step draws
``z = (mean + deviation * noise - shift_factor) * scaling_factor`` from them, as encoding afresh each time would.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robuq_core.files import read_json
from train.data.errors import DataError
from train.data.images import to_unit
from train.data.shards import ShardedTensor
from train.messages import one_line

_BATCH = 16

# Each but the first halves the picture; SD-VAE has four.
_MOST_BLOCKS = 8


@dataclass(frozen=True)
class LatentDataset:
    """``moments`` float16 ``[N, mirrors, 2 C, S, S]``, C means and then C deviations; ``labels`` int64 ``[N]``."""

    moments: Tensor | ShardedTensor
    labels: Tensor
    scaling_factor: float
    shift_factor: float = 0.0

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def channels(self) -> int:
        return self.moments.shape[2] // 2

    def draw(self, index: Tensor, mirrored: Tensor, noise: Tensor) -> Tensor:
        """Latents float32 ``[n, C, S, S]`` of ``index`` int64 ``[n]``, with ``noise`` of their own shape."""
        rows = [self.moments[i][int(flip)] for i, flip in zip(index.tolist(), mirrored.tolist(), strict=True)]
        mean, deviation = torch.stack(rows).float().chunk(2, dim=1)
        latents: Tensor = (mean + deviation * noise - self.shift_factor) * self.scaling_factor
        return latents

    def means(self, rows: slice) -> Tensor:
        """The unmirrored means, scaled, float32 ``[n, C, S, S]``."""
        return (self.moments[rows][:, 0, : self.channels].float() - self.shift_factor) * self.scaling_factor


class LatentEncoder:
    """The encoder of a diffusers ``AutoencoderKL`` folder, or of the ``vae`` folder in a pipeline's.

    Raises:
        DataError: diffusers is missing, or the folder holds no such model.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = vae_folder(folder)
        self.settings = _read_settings(self.folder)
        try:
            from diffusers import AutoencoderKL
        except ImportError as error:
            raise DataError(f"data.vae needs diffusers ({error}); from a checkout: pip install '.[vae]'") from error
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            load: Any = AutoencoderKL.from_pretrained  # untyped
            vae = load(str(self.folder), local_files_only=True)
        except Exception as error:  # a damaged folder leads the loader to raise almost anything
            raise DataError(f"data.vae {self.folder}: not a readable AutoencoderKL ({one_line(error)})") from error
        self.vae = vae.to(self.device).eval().requires_grad_(False)

    @property
    def channels(self) -> int:
        return int(self.vae.config.latent_channels)

    @property
    def scaling_factor(self) -> float:
        """What latents are multiplied by, so that their deviation is about one; of the folder's own config."""
        return float(self.vae.config.scaling_factor)

    @property
    def shift_factor(self) -> float:
        """What is taken from latents before; SD-VAE has none."""
        return float(self.vae.config.get("shift_factor") or 0.0)

    @torch.inference_mode()
    def moments(self, images: np.ndarray, mirrors: int) -> np.ndarray:
        """Float16 ``[n, mirrors, 2 C, S, S]`` of uint8 images ``[n, 3, H, W]``; the second mirror is flipped."""
        found = []
        for batch in torch.split(torch.from_numpy(images), _BATCH):
            pixels = to_unit(batch).to(self.device)
            sides = [self.vae.encode(side).latent_dist for side in (pixels, pixels.flip(-1))[:mirrors]]
            found.append(torch.stack([torch.cat([each.mean, each.std], dim=1) for each in sides], dim=1).half().cpu())
        return torch.cat(found).numpy()


def vae_folder(folder: Path) -> Path:
    return folder / "vae" if (folder / "vae" / "config.json").is_file() else folder


def vae_downscale(folder: Path) -> int:
    """Pixels a latent cell, from the folder's config alone: 8 for SD-VAE."""
    return int(2 ** (len(_read_settings(vae_folder(folder))["block_out_channels"]) - 1))


def _read_settings(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        settings: dict[str, Any] = read_json(path)
        blocks = settings["block_out_channels"] if isinstance(settings, dict) else None
        if not isinstance(blocks, list) or not 1 <= len(blocks) <= _MOST_BLOCKS:
            raise ValueError("no usable block_out_channels")
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"data.vae {folder}: not the folder of an AutoencoderKL ({one_line(error)}); give one with "
                        "config.json and its weights") from error  # fmt: skip
    return settings
