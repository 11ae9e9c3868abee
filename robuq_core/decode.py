"""From a network's output to pixels: unchanged, or through the decoder of an autoencoder in a diffusers folder.

One image at a time, so that an image depends only on its own latent, and memory does not grow with their number.
A folder that cannot be used raises :class:`DecoderError`.
"""

from __future__ import annotations

import copy
import importlib
import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from robuq_core.errors import UserError
from robuq_core.files import read_json

# SD-VAE and TAESD; the latter takes a fraction of the work.
AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny")
# Larger images (side in pixels) are decoded in overlapping, blended tiles of half that size, which bounds the memory.
# An AutoencoderKL's normalisation and attention then see one tile only: colours may differ slightly between tiles.
TILE_ABOVE = 1024

_FOLDER = "a diffusers folder of an AutoencoderKL (SD-VAE) or an AutoencoderTiny (TAESD)"
# Per block of a network, of which SD-VAE has two, and of blocks.
_MOST_LAYERS = 64
# Parts that decoding does not need.
_ENCODER_PARTS = ("encoder", "quant_conv")


class DecoderError(UserError):
    """A decoder that cannot be used; the message names the folder or the setting, and the fix."""


class PixelDecoder:
    """The identity, for a network of pixels: RGB, or grey with one channel."""

    name = "pixels"
    weight_bytes = 0

    def __init__(self, device: torch.device | str = "cpu", channels: int = 3) -> None:
        self.device, self.channels = torch.device(device), channels

    def image_size(self, sample_size: int) -> int:
        return sample_size

    def decode(self, sample: Tensor) -> Tensor:
        """``[C, H, W]`` to an image, float32 ``[3, H, W]``, -1 black to 1 white; values may lie outside."""
        return sample.expand(3, -1, -1) if self.channels == 1 else sample

    def replica(self, device: torch.device | str) -> PixelDecoder:
        return PixelDecoder(device, self.channels)


class LatentDecoder:
    """The decoder of an autoencoder: ``decode(z / scaling_factor + shift_factor)`` by its own configuration.

    May be called from several threads. ``channels``: of a latent.

    Args:
        autoencoder: an ``AutoencoderKL`` or ``AutoencoderTiny`` of diffusers; its encoder is removed.
    """

    def __init__(self, autoencoder: Any, name: str) -> None:
        config = autoencoder.config
        if config.out_channels != 3:
            raise DecoderError(f"{name}: config field out_channels is {config.out_channels}, not 3; use an RGB decoder")
        if config.get("latents_mean") is not None or config.get("latents_std") is not None:
            raise DecoderError(f"{name}: config fields latents_mean and latents_std are not supported; "
                               "use an autoencoder with a scaling_factor alone, such as SD-VAE")  # fmt: skip
        self.name = name
        self.channels: int = config.latent_channels
        for part in _ENCODER_PARTS:
            if hasattr(autoencoder, part):
                setattr(autoencoder, part, None)
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        self._scale = float(config.scaling_factor)
        self._shift = float(config.get("shift_factor") or 0.0)
        self._factor = _upsampling(config)
        self._lock = threading.Lock()
        # AutoencoderTiny derives its factor from the number of colours: eight by chance, right for TAESD only.
        self.autoencoder.spatial_scale_factor = self._factor
        # A quarter of an AutoencoderKL's tile overlaps, rounded in cells and again in pixels: multiples of four agree.
        # An eighth of an AutoencoderTiny's does; without a cell of overlap its blending gives black.
        cells = max(8, TILE_ABOVE // 2 // self._factor // 4 * 4)
        self.autoencoder.tile_latent_min_size = cells
        self.autoencoder.tile_sample_min_size = cells * self._factor

    @property
    def device(self) -> torch.device:
        return torch.device(self.autoencoder.device)

    @property
    def weight_bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.autoencoder.parameters())

    def image_size(self, sample_size: int) -> int:
        """Side in pixels of the image of a latent with sides of ``sample_size``."""
        return sample_size * self._factor

    @torch.inference_mode()
    def decode(self, sample: Tensor) -> Tensor:
        """``[C, H, W]`` to an image, float32 ``[3, H', W']``, -1 black to 1 white; values may lie outside."""
        latent = sample.to(self.device, torch.float32) / self._scale + self._shift
        # One at a time: torch's threads share the work of one image.
        with self._lock:
            self.autoencoder.use_tiling = self._factor * max(latent.shape[-2:]) > TILE_ABOVE
            (images,) = self.autoencoder.decode(latent[None], return_dict=False)
        return torch.as_tensor(images[0]).float()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.autoencoder, self.name)

    def replica(self, device: torch.device | str) -> LatentDecoder:
        """The decoder on ``device``; itself if it is there already."""
        if is_at(self.device, torch.device(device)):
            return self
        return LatentDecoder(copy.deepcopy(self.autoencoder).to(device), self.name)


Decoder = PixelDecoder | LatentDecoder


def is_at(device: torch.device, wanted: torch.device) -> bool:
    """Whether ``device`` satisfies ``wanted``; ``cuda`` without an index is any GPU."""
    return device.type == wanted.type and wanted.index in (None, device.index)


def load_decoder(path: Path | str, *, device: torch.device | str = "cpu") -> LatentDecoder:
    """The decoder in a local diffusers folder of an autoencoder, or in ``vae/`` of a local pipeline folder, in float32.

    Nothing is downloaded; a pickled ``.bin`` file is read as plain tensors.
    """
    folder = next((each for each in (Path(path), Path(path) / "vae") if (each / "config.json").is_file()), None)
    if folder is None:
        raise DecoderError(f"{path}: no config.json in it; give {_FOLDER}")
    library = _checked_library(folder)
    try:
        autoencoder, loading = library.from_pretrained(
            folder,
            torch_dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
            disable_mmap=True,  # overwriting a mapped file would kill the server that loads it
            low_cpu_mem_usage=False,  # True warns about a missing extra on every load
        )
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, EOFError, SafetensorError,
            pickle.UnpicklingError) as error:  # fmt: skip
        raise DecoderError(f"{folder}: weights that cannot be read ({_first_line(error)}); copy it again") from error
    absent = [name for name in loading["missing_keys"] if name.partition(".")[0] not in _ENCODER_PARTS]
    if absent:  # diffusers has filled them with random numbers
        raise DecoderError(f"{folder}: the weights lack {absent[0]} and {len(absent) - 1} more; copy the folder again")
    for name, tensor in autoencoder.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise DecoderError(f"{folder}: weights {name} has values that are not finite; copy the folder again")
    return LatentDecoder(autoencoder.to(device), folder.name)


def to_pixels(image: Tensor) -> np.ndarray:
    """An image ``[3, H, W]`` as uint8 ``[H, W, 3]``: ``127.5 x + 128``, clamped to 0..255."""
    pixels = (image * 127.5 + 128).clamp(0, 255).to(torch.uint8)
    return pixels.permute(1, 2, 0).contiguous().cpu().numpy()


def _checked_library(folder: Path) -> Any:
    """The diffusers class that ``config.json`` names, unless the configuration needs more memory than the files fill.

    It is built on the meta device to find out. The files may lack the encoder, which is about as large as the decoder.
    """
    path = folder / "config.json"
    try:
        config = read_json(path)
        kind = config["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DecoderError(f"{path}: field _class_name cannot be read; give {_FOLDER}") from error
    if kind not in AUTOENCODERS:
        raise DecoderError(f"{path}: field _class_name is {kind!r}; give {_FOLDER}")
    try:
        library = getattr(importlib.import_module("diffusers"), kind)
    except ImportError as error:
        raise DecoderError("a latent decoder needs diffusers; from a checkout: pip install '.[vae]'") from error
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    for key, value in config.items():
        values = value if isinstance(value, list) else [value]
        is_count = "blocks" in key or key == "layers_per_block"  # of modules, which take time even without memory
        if len(values) > _MOST_LAYERS or (is_count and any(type(n) is not int or n > _MOST_LAYERS for n in values)):
            raise DecoderError(f"{path}: field {key} is beyond the limits; give {_FOLDER}")
    try:
        with torch.device("meta"):
            needed = sum(tensor.numel() for tensor in library.from_config(config).state_dict().values())
    except Exception as error:  # diffusers raises almost anything on a foreign configuration
        raise DecoderError(f"{path}: describes no {kind} ({_first_line(error)}); give {_FOLDER}") from error
    stored = sum(file.stat().st_size for file in folder.glob("diffusion_pytorch_model*") if file.is_file())
    if needed > 2 * stored:
        raise DecoderError(f"{folder}: weights that cannot be read (config.json describes {needed} values, the files "
                           f"have {stored} bytes); copy it again")  # fmt: skip
    return library


def _upsampling(config: Any) -> int:
    """Pixels per latent cell, along a side."""
    if config.get("decoder_block_out_channels") is not None:
        return int(config.upsampling_scaling_factor ** (len(config.decoder_block_out_channels) - 1))
    return int(2 ** (len(config.block_out_channels) - 1))


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
