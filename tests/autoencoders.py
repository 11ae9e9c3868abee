"""Tiny autoencoders with random weights as diffusers saves them, and a packed model that draws latents for them."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny import write_tiny

from robuq_core.config import ModelConfig

LATENT_CHANNELS = 4
# Two blocks in a decoder: a factor of two.
FACTOR = 2
LATENT = ModelConfig(
    input_size=8, patch_size=4, in_channels=LATENT_CHANNELS, hidden_size=48, depth=1, num_heads=4, num_classes=5
)
IMAGE_SIZE = FACTOR * LATENT.input_size


def save_autoencoder_kl(folder: Path, seed: int = 0, **options: object) -> Path:
    """SD-VAE's class: group norms and an attention over the whole picture."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    config = {
        "block_out_channels": (4, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 2,
        "latent_channels": LATENT_CHANNELS,
    } | options
    AutoencoderKL(**config).save_pretrained(folder)
    return folder


def save_autoencoder_tiny(folder: Path, seed: int = 0, **options: object) -> Path:
    """TAESD's class: convolutions alone."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(seed)
    config = {
        "encoder_block_out_channels": (4, 4),
        "decoder_block_out_channels": (4, 4),
        "num_encoder_blocks": (1, 1),
        "num_decoder_blocks": (1, 1),
        "latent_channels": LATENT_CHANNELS,
    } | options
    AutoencoderTiny(**config).save_pretrained(folder)
    return folder


def write_latent(path: Path, input_size: int = LATENT.input_size) -> Path:
    """A packed model of latents."""
    write_tiny(path, LATENT.model_copy(update={"input_size": input_size}))
    return path
