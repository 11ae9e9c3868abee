"""The first stage: a data set, whatever it comes as, becomes shards in ``run_dir/data`` that training maps.

The data set is read once, by threads, and never held in memory whole.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from train.config import TrainConfig
from train.data.digest import data_digest, fingerprint
from train.data.errors import DataError
from train.data.images import ImageDataset, read_square
from train.data.latents import LatentDataset, LatentEncoder, vae_downscale, vae_folder
from train.data.shards import Index, open_shards, read_index, update_index, verify_shards, write_shards
from train.data.sources import Source, open_source, wrong_classes
from train.parallel import on_first
from train.state import locked

Dataset = ImageDataset | LatentDataset
Note = Callable[[str], None]


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


def prepare(config: TrainConfig, note: Note = print, verify: bool = False) -> Index:
    """Bring ``run_dir/data`` up to date with ``data`` and the files it names; ``note`` is told of what was made.

    Of several processes the first does it. ``verify``: also read every shard and compare its checksum.

    Raises:
        DataError: data that cannot be used, a damaged folder, a full disk. StateError: another run is at it.
    """
    on_first(lambda: _bring_up_to_date(config, note, verify))
    index = read_index(data_folder(config))
    assert index is not None
    return index


def _bring_up_to_date(config: TrainConfig, note: Note, verify: bool) -> None:
    if not config.data.path.exists():
        raise DataError(f"data.path {config.data.path} does not exist")
    folder = data_folder(config)
    index = _current(config, read_index(folder), note)
    if index is None:
        source = open_source(config.data.path, config.model.num_classes, config.data.split)
        # Before anything is written: a data set that cannot be read at all leaves no folder behind.
        read_square(source, 0, image_size(config), config.data.fit)
        with locked(config.run_dir / "data.pt"):
            _make(config, source, note)
    elif verify:
        verify_shards(folder, index)
        note(f"prepare: {len(index.shards)} shards are as they were written")


def open_dataset(config: TrainConfig, index: Index) -> Dataset:
    """The prepared samples, memory-mapped.

    Raises:
        DataError: a shard is missing or damaged.
    """
    samples, labels = open_shards(data_folder(config), index)
    if index.kind == "latents":
        return LatentDataset(samples, labels, index.scaling_factor, index.shift_factor)
    return ImageDataset(samples, labels, config.data.supersample)


def read_images(config: TrainConfig, count: int | None = None, seed: int = 0) -> ImageDataset:
    """Images of the data set in pixels, at the size that the model draws: all, or ``count`` picked by ``seed``.

    Of a run on pixels they are the prepared ones, mapped; of a run on latents they are read afresh, so give ``count``.

    Raises:
        DataError: as :func:`prepare`.
    """
    if config.data.vae is None:
        dataset = open_dataset(config, prepare(config, note=lambda _: None))
        assert isinstance(dataset, ImageDataset)
        return dataset if count is None else _picked(dataset, _pick(len(dataset), count, seed))
    source = open_source(config.data.path, config.model.num_classes, config.data.split)
    index = _pick(len(source), len(source) if count is None else count, seed)
    squares = _reader(source, image_size(config), config)
    return ImageDataset(torch.from_numpy(squares(index)), torch.from_numpy(source.labels)[index])


def _pick(total: int, count: int, seed: int) -> list[int]:
    chosen = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count]
    return sorted(chosen.tolist())


def _picked(dataset: ImageDataset, index: list[int]) -> ImageDataset:
    return ImageDataset(dataset.images[index], dataset.labels[index], dataset.supersample)


def _settings(config: TrainConfig) -> dict[str, Any]:
    """What the shards depend on besides the files themselves."""
    latents = config.data.vae is not None
    return {
        "size": image_size(config),
        "fit": config.data.fit,
        "split": config.data.split,
        "latents": latents,
        "channels": config.model.in_channels,
        "mirrors": 2 if latents and config.data.flip_probability > 0 else 1,
    }


def marks(config: TrainConfig) -> str:
    """Alike as long as neither the data nor the VAE were touched."""
    vae = config.data.vae
    return fingerprint(config.data.path) + ("" if vae is None else ":" + fingerprint(vae_folder(vae)))


def _digests(config: TrainConfig) -> dict[str, str]:
    """SHA-256 of the data; with a VAE also its own, as latents are the work of both."""
    vae = config.data.vae
    return {"data": data_digest(config.data.path), **({} if vae is None else {"vae": data_digest(vae_folder(vae))})}


def _current(config: TrainConfig, index: Index | None, note: Note) -> Index | None:
    """``index`` if it is of the configured data, else none; says why not."""
    if index is None:
        return None
    wanted = _settings(config)
    changed = [f"{key} {index.made_with.get(key)} is now {wanted[key]}" for key in wanted
               if index.made_with.get(key) != wanted[key]]  # fmt: skip
    if not changed and (found := marks(config)) != index.fingerprint:
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


def _make(config: TrainConfig, source: Source, note: Note) -> None:
    settings, size = _settings(config), image_size(config)
    transparent: list[int] = []
    squares = _reader(source, size, config, transparent)
    index = Index(
        kind="images",
        made_with=settings,
        digests=_digests(config),
        fingerprint=marks(config),
        count=len(source),
        classes=config.model.num_classes,
        class_names=source.class_names,
        shape=(picture_channels(config), size, size),
        dtype="uint8",
    )
    make: Callable[[range], np.ndarray] = squares
    if config.data.vae is not None:
        encoder = LatentEncoder(config.data.vae)
        side, channels, mirrors = config.model.input_size, config.model.in_channels, settings["mirrors"]
        if encoder.channels != channels:
            raise DataError(f"data.vae {config.data.vae} has {encoder.channels} latent channels but model.in_channels "
                            f"is {channels}; change the latter")  # fmt: skip
        index = index.model_copy(update={
            "kind": "latents", "shape": (mirrors, 2 * channels, side, side), "dtype": "float16",
            "scaling_factor": encoder.scaling_factor, "shift_factor": encoder.shift_factor,
        })  # fmt: skip

        def make(rows: range) -> np.ndarray:
            return encoder.moments(squares(rows), mirrors)

    finished = write_shards(data_folder(config), index, source.labels, make, note)
    if transparent:
        note(f"prepare: {len(transparent)} images have transparency and were composited on white, "
             f"{source.name(min(transparent))} the first")  # fmt: skip
    note(f"prepare: {finished.count} {finished.kind} of {finished.classes} classes in {len(finished.shards)} shards")


def _reader(
    source: Source, size: int, config: TrainConfig, transparent: list[int] | None = None
) -> Callable[[range | list[int]], np.ndarray]:
    fit, channels = config.data.fit, picture_channels(config)

    def read(rows: range | list[int]) -> np.ndarray:
        with ThreadPoolExecutor() as pool:
            return np.stack(list(pool.map(lambda i: read_square(source, i, size, fit, channels, transparent), rows)))

    return read
