"""An SD-VAE small enough for tests: few latent channels, two pixels a cell, random weights."""

from __future__ import annotations

from pathlib import Path

import torch


def write_vae(folder: Path, seed: int = 0, channels: int = 4) -> Path:
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    vae = AutoencoderKL(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=channels,
        scaling_factor=0.5,
    )
    vae.save_pretrained(folder)
    return folder
