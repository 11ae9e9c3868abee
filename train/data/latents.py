"""Latents: of an autoencoder that encodes images here, or of fast-DiT's feature folders, encoded elsewhere."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from robuq_core.files import read_json
from train.data.batches import to_unit
from train.data.pictures import DataError
from train.data.sources import wrong_classes
from train.logs import one_line
from train.parallel import training_device

_BATCH = 16
_MOST_BLOCKS = 8  # of an autoencoder; each but the first halves the image, and SD-VAE has four


class LatentEncoder:
    """The encoder of a diffusers ``AutoencoderKL`` folder, or of the ``vae`` folder in a pipeline's.

    ``scaling_factor``: what latents are multiplied by, so that their deviation is about one. ``shift_factor``: what is
    taken from them before; SD-VAE has none. Raises DataError if diffusers is missing or the folder holds no such model.
    """

    def __init__(self, folder: Path, bf16: bool = False) -> None:
        folder, self._bf16 = vae_folder(folder), bf16
        _block_channels(folder)
        try:
            from diffusers import AutoencoderKL
        except ImportError as error:
            raise DataError(f"data.vae needs diffusers ({error}); from a checkout: pip install '.[vae]'") from error
        try:
            load: Any = AutoencoderKL.from_pretrained  # untyped
            vae = load(str(folder), local_files_only=True)
        except Exception as error:  # a damaged folder leads the loader to raise almost anything
            raise DataError(f"data.vae {folder}: not a readable AutoencoderKL ({one_line(error)})") from error
        self.device = training_device()
        self.vae = vae.to(self.device).eval().requires_grad_(False)
        self.channels = int(vae.config.latent_channels)
        self.scaling_factor = float(vae.config.scaling_factor)
        self.shift_factor = float(vae.config.get("shift_factor") or 0.0)

    @torch.inference_mode()
    def moments(self, images: np.ndarray, mirrors: int) -> np.ndarray:
        """Float16 ``[n, mirrors, 2 C, S, S]`` of uint8 images ``[n, 3, H, W]``; the second mirror is flipped."""
        found = []
        for batch in torch.split(torch.from_numpy(images), _BATCH):
            pixels = to_unit(batch.to(self.device))
            with torch.autocast(self.device.type, dtype=torch.bfloat16) if self._bf16 else nullcontext():
                sides = [self.vae.encode(side).latent_dist for side in (pixels, pixels.flip(-1))[:mirrors]]
            found.append(torch.stack([torch.cat([each.mean, each.std], dim=1) for each in sides], dim=1).half().cpu())
        return torch.cat(found).numpy()


def vae_folder(folder: Path) -> Path:
    return folder / "vae" if (folder / "vae" / "config.json").is_file() else folder


def vae_downscale(folder: Path) -> int:
    """Pixels a latent cell, from the folder's config alone: 8 for SD-VAE."""
    return int(2 ** (len(_block_channels(vae_folder(folder))) - 1))


def _block_channels(folder: Path) -> list[Any]:
    try:
        blocks = read_json(folder / "config.json")["block_out_channels"]
        if not isinstance(blocks, list) or not 1 <= len(blocks) <= _MOST_BLOCKS:
            raise ValueError("no usable block_out_channels")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"data.vae {folder}: not the folder of an AutoencoderKL ({one_line(error)}); give one with "
                        "config.json and its weights") from error  # fmt: skip
    return blocks


def features_folders(path: Path) -> tuple[Path, Path] | None:
    """``NAME_features`` and ``NAME_labels`` in ``path``, as fast-DiT's ``extract_features.py`` leaves them.

    Raises DataError if there are several, or one lacks the other.
    """
    found = sorted(each for each in path.glob("*_features") if any(each.glob("*.npy"))) if path.is_dir() else []
    if not found:
        return None
    labels = found[0].with_name(found[0].name.removesuffix("_features") + "_labels")
    if len(found) > 1 or not labels.is_dir():
        raise DataError(f"data.path {path} must hold one NAME_features folder and its NAME_labels, not "
                        f"{', '.join(each.name for each in found)} without {labels.name}")  # fmt: skip
    return found[0], labels


class Features:
    """Latents of fast-DiT: ``NAME_features/I.npy``, float ``[1, C, S, S]``, scaled, and ``NAME_labels/I.npy``, ``[1]``;
    ``labels`` int64 ``[N]``.

    Raises DataError if a feature lacks its label, a file is no such array, or labels are not ``0 .. num_classes - 1``.
    """

    def __init__(self, path: Path, num_classes: int) -> None:
        folders = features_folders(path)
        assert folders is not None
        self.files = sorted(folders[0].glob("*.npy"))
        labels = self._each([folders[1] / file.name for file in self.files], (), "iu")
        self.labels = np.array(labels, dtype=np.int64) * (num_classes > 0)
        if num_classes and (self.labels.min() < 0 or self.labels.max() >= num_classes):
            raise wrong_classes(path, self.labels, num_classes)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, rows: range, shape: tuple[int, ...]) -> np.ndarray:
        """Moments float16 ``[n, 1, 2 C, S, S]`` of ``rows``, whose latents are of ``shape`` ``(C, S, S)``."""
        drawn = np.stack(self._each([self.files[i] for i in rows], shape, "f")).astype(np.float16)
        return np.concatenate([drawn, np.zeros_like(drawn)], axis=1)[:, None]

    def _each(self, files: list[Path], shape: tuple[int, ...], kinds: str) -> list[np.ndarray]:
        with ThreadPoolExecutor() as pool:
            return list(pool.map(lambda file: _read_npy(file, shape, kinds), files))


def _read_npy(path: Path, shape: tuple[int, ...], kinds: str) -> np.ndarray:
    """An array of ``shape``, with or without a leading 1, whose kind of number is one of ``kinds``."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{path}: not a readable npy file ({one_line(error)}); extract the features again") from error
    if array.shape not in (shape, (1, *shape)) or array.dtype.kind not in kinds:
        wanted = f"floats {list(shape)}" if shape else "a whole number"
        raise DataError(f"{path}: {array.dtype} {list(array.shape)}, not {wanted}; check model.in_channels and "
                        "model.input_size, or extract the features again")  # fmt: skip
    return np.array(array).reshape(shape)
