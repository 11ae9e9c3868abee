"""The first stage: a data set, whatever it comes as, becomes shards in ``run_dir/data`` that training maps.

The data set is read once, by threads, and never held in memory whole. Several processes share the work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from train.config import TrainConfig
from train.data.batches import Dataset, ImageDataset, LatentDataset, some_rows
from train.data.latents import Features, LatentEncoder, features_folders, vae_downscale, vae_folder
from train.data.pictures import DataError, Fit
from train.data.shards import Index, data_digest, fingerprint, open_shards, read_index, write_json, write_shards
from train.data.sources import Source, Split, open_source, read_square, wrong_classes
from train.parallel import any_of, from_first, on_first, training_device
from train.state import exclusive

Note = Callable[[str], None]


def data_folder(config: TrainConfig) -> Path:
    """Of the split that is read: the one that is held out lies beside the one that is trained on."""
    return config.run_dir / ("data" if config.data.split == "train" else f"data-{config.data.split}")


def image_size(config: TrainConfig) -> int:
    """Side in pixels at which images are kept, or encoded, and generated."""
    vae = config.data.vae
    return config.model.input_size * (1 if vae is None else vae_downscale(vae))


def prepare(config: TrainConfig, note: Note = print, fingerprint: Callable[[Path], str] = fingerprint) -> Index:
    """Bring ``run_dir/data`` up to date with ``data`` and the files it names; ``note`` gets what was made.

    Several processes make it together, each its share of the shards. ``fingerprint``: one that remembers the paths that
    it has walked saves minutes on a network disk.

    Raises DataError for data that cannot be used, a damaged folder or a full disk, StateError if another run is
    preparing it.
    """

    def marks() -> str:
        """Alike as long as neither the data nor the VAE were touched."""
        vae = config.data.vae
        return fingerprint(config.data.path) + ("" if vae is None else ":" + fingerprint(vae_folder(vae)))

    if from_first(lambda: _is_outdated(config, note, marks)):
        with exclusive(config.run_dir / "data.pt"):
            _make(config, note, marks)
    index = read_index(data_folder(config))
    assert index is not None
    return index


def open_dataset(config: TrainConfig, index: Index) -> Dataset:
    """The prepared samples, memory-mapped. Raises DataError if a shard is missing or damaged."""
    samples, labels = open_shards(data_folder(config), index)
    if index.kind == "latents":
        return LatentDataset(samples, labels, index.scaling_factor, index.shift_factor)
    return ImageDataset(samples, labels)


def load_dataset(
    path: Path, size: int, num_classes: int, split: Split = "train", fit: Fit = "resize", count: int | None = None
) -> ImageDataset:
    """Images of ``path`` in RGB at ``size`` pixels, in memory: all, or ``count`` at random, always the same ones.

    Raises DataError if there are no images, an unreadable one, or classes that do not match ``num_classes``.
    """
    if features_folders(path) is not None:
        raise DataError(f"data.path {path} holds latents and no photos; set evaluation.reference to ADM's npz, or "
                        "data.path to the photos")  # fmt: skip
    source = open_source(path, num_classes, split)
    rows = some_rows(len(source), count)
    images = _read_squares(source, rows, size, fit, 3)
    return ImageDataset(torch.from_numpy(images), torch.from_numpy(source.labels)[rows])


def holds_features(config: TrainConfig) -> bool:
    """Whether ``data.path`` holds latents that another program encoded."""
    return features_folders(config.data.path) is not None


def _open(config: TrainConfig) -> Source | Features:
    if holds_features(config):
        return Features(config.data.path, config.model.num_classes)
    return open_source(config.data.path, config.model.num_classes, config.data.split)


def _is_outdated(config: TrainConfig, note: Note, marks: Callable[[], str]) -> bool:
    """Whether the shards are not of the configured data; says why not."""
    if not config.data.path.exists():
        raise DataError(f"data.path {config.data.path} does not exist")
    folder, wanted = data_folder(config), _settings(config)
    index = read_index(folder)
    if index is not None:
        changed = [f"{key} {index.made_with.get(key)} is now {wanted[key]}" for key in wanted
                   if index.made_with.get(key) != wanted[key]]  # fmt: skip
        if not changed and (found := marks()) != index.fingerprint:
            digests = _digests(config)
            changed = [f"data.{'path' if key == 'data' else key} has other content" for key, digest in digests.items()
                       if index.digests.get(key) != digest]  # fmt: skip
            if not changed:  # the very same data, under other times
                write_json(folder / "index.json", index.model_copy(update={"fingerprint": found}))
        if not changed:
            if index.classes != config.model.num_classes:
                _, labels = open_shards(folder, index)
                raise wrong_classes(config.data.path, labels.numpy(), config.model.num_classes)
            return False
        note(f"prepare: made again, as {', '.join(changed)}")
    # Before anything is written: a data set that cannot be read at all leaves no folder behind.
    source = _open(config)
    if isinstance(source, Source):
        _read_squares(source, [0], image_size(config), config.data.fit, 3)
    else:
        source.read(range(1), _latent_shape(config))
    return True


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


def _encodes_in_bf16(config: TrainConfig) -> bool:
    fast = training_device().type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return config.precision == "bf16" or (config.precision == "auto" and fast)


def _digests(config: TrainConfig) -> dict[str, str]:
    """SHA-256 of the data; with a VAE also its own, as latents are the work of both."""
    vae = config.data.vae
    return {"data": data_digest(config.data.path), **({} if vae is None else {"vae": data_digest(vae_folder(vae))})}


def _make(config: TrainConfig, note: Note, marks: Callable[[], str]) -> None:
    """Every process of a run makes its share."""
    source, settings, size, vae = _open(config), _settings(config), image_size(config), config.data.vae
    channels, mirrors, transparent = config.model.in_channels, settings["mirrors"], list[str]()
    shape: tuple[int, ...] = (mirrors, 2 * channels, *_latent_shape(config)[1:])
    encoder = None
    if vae is None:
        shape = (channels, size, size)
        if isinstance(source, Features):
            raise DataError(f"data.path {config.data.path} holds latents: set data.vae to the autoencoder that made "
                            "them")  # fmt: skip
    elif isinstance(source, Source):
        encoder = LatentEncoder(vae, bf16="autocast" in settings)
        if encoder.channels != channels:
            raise DataError(f"data.vae {vae} has {encoder.channels} latent channels but model.in_channels is "
                            f"{channels}; change the latter")  # fmt: skip

    def make(rows: range) -> np.ndarray:
        if isinstance(source, Features):
            return source.read(rows, _latent_shape(config))
        images = _read_squares(source, rows, size, config.data.fit, channels if encoder is None else 3, transparent)
        return images if encoder is None else encoder.moments(images, mirrors)

    digests, fingerprints = from_first(lambda: (_digests(config), marks()))
    index = Index(
        kind="images" if vae is None else "latents",
        made_with=settings,
        digests=digests,
        fingerprint=fingerprints,
        count=len(source),
        classes=config.model.num_classes,
        shape=shape,
        dtype="uint8" if vae is None else "float16",
        scaling_factor=1.0 if encoder is None else encoder.scaling_factor,
        shift_factor=0.0 if encoder is None else encoder.shift_factor,
    )
    made = write_shards(data_folder(config), index, source.labels, make, note)
    shown = any_of(min(transparent, default=None))
    if shown is not None:
        on_first(lambda: note(f"prepare: images with transparency were composited on white, such as {shown}"))
    on_first(lambda: note(f"prepare: {made.count} {made.kind} of {made.classes} classes in {len(made.shards)} shards"))


def _read_squares(
    source: Source, rows: Sequence[int], size: int, fit: Fit, channels: int, transparent: list[str] | None = None
) -> np.ndarray:
    """Uint8 ``[n, channels, size, size]``, by threads."""
    with ThreadPoolExecutor() as pool:
        return np.stack(list(pool.map(lambda i: read_square(source, i, size, fit, channels, transparent), rows)))
