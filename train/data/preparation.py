"""The first stage: a data set, whatever it comes as, becomes shards in ``run_dir/data`` that training maps.

The data set is read once, by threads, and never held in memory whole. Several processes share the work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from robuq_core.files import read_json
from train.config import TrainConfig
from train.data.batches import ImageDataset, LatentDataset, some_rows, to_unit
from train.data.pictures import DataError, Fit
from train.data.shards import (
    Index,
    data_digest,
    fingerprint,
    open_shards,
    read_index,
    update_index,
    verify_shards,
    write_shards,
)
from train.data.sources import (
    Features,
    Source,
    Split,
    features_folders,
    open_features,
    open_source,
    read_square,
    wrong_classes,
)
from train.logs import one_line
from train.parallel import from_first, on_first, training_device
from train.state import exclusive

Dataset = ImageDataset | LatentDataset
Note = Callable[[str], None]
Fingerprint = Callable[[Path], str]

_BATCH = 16
_MOST_BLOCKS = 8  # of an autoencoder; each but the first halves the image, and SD-VAE has four


def data_folder(config: TrainConfig) -> Path:
    """Of the split that is read: the one that is held out lies beside the one that is trained on."""
    return config.run_dir / ("data" if config.data.split == "train" else f"data-{config.data.split}")


def image_size(config: TrainConfig) -> int:
    """Side in pixels at which images are kept, or encoded."""
    if config.data.vae is not None:
        return config.model.input_size * vae_downscale(config.data.vae)
    return config.data.resize or config.model.input_size * config.data.supersample


def picture_channels(config: TrainConfig) -> int:
    """Of the images that are kept or encoded: 1 grey, 3 RGB, which is what an autoencoder takes."""
    return config.model.in_channels if config.data.vae is None else 3


def prepare(
    config: TrainConfig, note: Note = print, verify: bool = False, fingerprint: Fingerprint = fingerprint
) -> Index:
    """Bring ``run_dir/data`` up to date with ``data`` and the files it names; ``note`` gets what was made.

    Several processes make it together, each its share of the shards. ``verify``: also read every shard and compare its
    checksum. ``fingerprint``: one that remembers the paths that it has walked saves minutes on a network disk.

    Raises:
        DataError: data that cannot be used, a damaged folder, a full disk. StateError: another run is preparing it.
    """

    def marks() -> str:
        """Alike as long as neither the data nor the VAE were touched."""
        vae = config.data.vae
        return fingerprint(config.data.path) + ("" if vae is None else ":" + fingerprint(vae_folder(vae)))

    if from_first(lambda: _is_outdated(config, note, verify, marks)):
        with exclusive(config.run_dir / "data.pt"):
            _make(config, _open(config), note, marks)
    index = read_index(data_folder(config))
    assert index is not None
    return index


def _open(config: TrainConfig) -> Source | Features:
    found = open_features(config.data.path, config.model.num_classes)
    return found or open_source(config.data.path, config.model.num_classes, config.data.split)


def _is_outdated(config: TrainConfig, note: Note, verify: bool, marks: Callable[[], str]) -> bool:
    if not config.data.path.exists():
        raise DataError(f"data.path {config.data.path} does not exist")
    folder = data_folder(config)
    index = _current(config, read_index(folder), note, marks)
    if index is None:
        # Before anything is written: a data set that cannot be read at all leaves no folder behind.
        source = _open(config)
        if isinstance(source, Source):
            read_square(source, 0, image_size(config), config.data.fit)
        else:
            source.read(range(1), _latent_shape(config))
    elif verify:
        verify_shards(folder, index)
        note(f"prepare: {len(index.shards)} shards are as they were written")
    return index is None


def open_dataset(config: TrainConfig, index: Index) -> Dataset:
    """The prepared samples, memory-mapped.

    Raises:
        DataError: a shard is missing or damaged.
    """
    samples, labels = open_shards(data_folder(config), index)
    if index.kind == "latents":
        return LatentDataset(samples, labels, index.scaling_factor, index.shift_factor)
    return ImageDataset(samples, labels, config.data.supersample)


def _latent_shape(config: TrainConfig) -> tuple[int, ...]:
    return (config.model.in_channels, config.model.input_size, config.model.input_size)


def _settings(config: TrainConfig) -> dict[str, Any]:
    """What the shards depend on besides the files themselves."""
    latents = config.data.vae is not None
    encoded = latents and not holds_features(config)
    return {
        "size": image_size(config),
        "fit": config.data.fit,
        "split": config.data.split,
        "latents": latents,
        "channels": config.model.in_channels,
        "mirrors": 2 if encoded and config.data.flip_probability > 0 else 1,
        **({"autocast": "bf16"} if encoded and _encodes_in_bf16(config) else {}),
    }


def holds_features(config: TrainConfig) -> bool:
    """Whether ``data.path`` holds latents that another program encoded."""
    return features_folders(config.data.path) is not None


def _encodes_in_bf16(config: TrainConfig) -> bool:
    device = training_device()
    return config.precision == "bf16" or (
        config.precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    )


def _digests(config: TrainConfig) -> dict[str, str]:
    """SHA-256 of the data; with a VAE also its own, as latents are the work of both."""
    vae = config.data.vae
    return {"data": data_digest(config.data.path), **({} if vae is None else {"vae": data_digest(vae_folder(vae))})}


def _current(config: TrainConfig, index: Index | None, note: Note, marks: Callable[[], str]) -> Index | None:
    """``index`` if it is of the configured data, else none; says why not."""
    if index is None:
        return None
    wanted = _settings(config)
    changed = [f"{key} {index.made_with.get(key)} is now {wanted[key]}" for key in wanted
               if index.made_with.get(key) != wanted[key]]  # fmt: skip
    if not changed and (found := marks()) != index.fingerprint:
        digests = _digests(config)
        if digests != index.digests:
            changed = [f"data.{'path' if digests['data'] != index.digests['data'] else 'vae'} has other content"]
        else:
            index = index.model_copy(update={"fingerprint": found})
            update_index(data_folder(config), index)
    if changed:
        note(f"prepare: made again, as {', '.join(changed)}")
        return None
    if index.classes != config.model.num_classes:
        _, labels = open_shards(data_folder(config), index)
        raise wrong_classes(config.data.path, labels.numpy(), config.model.num_classes)
    return index


def _make(config: TrainConfig, source: Source | Features, note: Note, marks: Callable[[], str]) -> None:
    """Every process of a run makes its share."""
    settings, size, channels = _settings(config), image_size(config), config.model.in_channels
    transparent: list[int] = []
    digests, fingerprints = from_first(lambda: (_digests(config), marks()))
    index = Index(
        kind="images",
        made_with=settings,
        digests=digests,
        fingerprint=fingerprints,
        count=len(source),
        classes=config.model.num_classes,
        class_names=source.class_names if isinstance(source, Source) else None,
        shape=(picture_channels(config), size, size),
        dtype="uint8",
    )
    mirrors = settings["mirrors"]
    latents = {"kind": "latents", "shape": (mirrors, 2 * channels, *_latent_shape(config)[1:]), "dtype": "float16"}
    make: Callable[[range], np.ndarray]
    if isinstance(source, Features):
        if config.data.vae is None:
            raise DataError(
                f"data.path {config.data.path} holds latents: set data.vae to the autoencoder that made them"
            )
        index = index.model_copy(update=latents)

        def make(rows: range) -> np.ndarray:
            drawn = source.read(rows, _latent_shape(config))
            return np.concatenate([drawn, np.zeros_like(drawn)], axis=1)[:, None].astype(np.float16)

    elif config.data.vae is not None:
        encoder = LatentEncoder(config.data.vae, bf16="autocast" in settings)
        if encoder.channels != channels:
            raise DataError(f"data.vae {config.data.vae} has {encoder.channels} latent channels but model.in_channels "
                            f"is {channels}; change the latter")  # fmt: skip
        factors = {"scaling_factor": encoder.scaling_factor, "shift_factor": encoder.shift_factor}
        index = index.model_copy(update={**latents, **factors})
        squares = _reader(source, size, config.data.fit, picture_channels(config), transparent)

        def make(rows: range) -> np.ndarray:
            return encoder.moments(squares(rows), mirrors)

    else:
        make = _reader(source, size, config.data.fit, picture_channels(config), transparent)
    finished = write_shards(data_folder(config), index, source.labels, make, note, transparent)
    counts = [shard.transparent for shard in finished.shards if shard.transparent]
    if counts and isinstance(source, Source):
        first = source.name(min(first for _, first in counts))
        total = sum(count for count, _ in counts)
        on_first(
            lambda: note(f"prepare: {total} images have transparency and were composited on white, {first} the first")
        )
    on_first(lambda: note(f"prepare: {finished.count} {finished.kind} of {finished.classes} classes in "
                          f"{len(finished.shards)} shards"))  # fmt: skip


def _reader(
    source: Source, size: int, fit: Fit, channels: int, transparent: list[int] | None = None
) -> Callable[[Sequence[int]], np.ndarray]:
    def read(rows: Sequence[int]) -> np.ndarray:
        with ThreadPoolExecutor() as pool:
            return np.stack(list(pool.map(lambda i: read_square(source, i, size, fit, channels, transparent), rows)))

    return read


def load_dataset(
    path: Path, size: int, num_classes: int, split: Split = "train", fit: Fit = "resize", count: int | None = None
) -> ImageDataset:
    """Images of ``path`` in RGB at ``size`` pixels, in memory: all, or ``count`` at random, always the same ones.

    Raises:
        DataError: no images, an unreadable one, or classes that do not match ``num_classes``.
    """
    if features_folders(path) is not None:
        raise DataError(f"data.path {path} holds latents and no photos; set evaluation.reference to ADM's npz, or "
                        "data.path to the photos")  # fmt: skip
    source = open_source(path, num_classes, split)
    rows = some_rows(len(source), count)
    images = _reader(source, size, fit, 3)(rows)
    return ImageDataset(torch.from_numpy(images), torch.from_numpy(source.labels)[rows])


class LatentEncoder:
    """The encoder of a diffusers ``AutoencoderKL`` folder, or of the ``vae`` folder in a pipeline's.

    Raises:
        DataError: diffusers is missing, or the folder holds no such model.
    """

    def __init__(self, folder: Path, bf16: bool = False) -> None:
        self.folder, self._bf16 = vae_folder(folder), bf16
        self.settings = _read_settings(self.folder)
        try:
            from diffusers import AutoencoderKL
        except ImportError as error:
            raise DataError(f"data.vae needs diffusers ({error}); from a checkout: pip install '.[vae]'") from error
        self.device = training_device()
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
            pixels = to_unit(batch.to(self.device))
            with torch.autocast(self.device.type, dtype=torch.bfloat16) if self._bf16 else nullcontext():
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
