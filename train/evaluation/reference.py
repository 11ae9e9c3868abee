"""What the training photos look like to a feature network; kept in the run folder, as it takes long to find."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robuq_core.files import replacing
from train.config import TrainConfig
from train.data import ImageDataset, centre_images, image_size
from train.evaluation.figures import Gallery, Moments, Reference, RunningMoments, gallery_of
from train.evaluation.networks import EvaluationError, FeatureNetwork, Features
from train.logs import one_line, tracked
from train.run import Run

MOST_LATENT_PHOTOS = 10_000  # a run on latents keeps no pixels: its photos are decoded afresh, into memory
GALLERY_PHOTOS = 10_000
_BATCH = 64


def sample_side(config: TrainConfig) -> int:
    """Side in pixels of the images of the configured model."""
    return config.model.input_size if config.data.vae is None else image_size(config)


def reference(run: Run, network: FeatureNetwork, most: int | None = None) -> Reference:
    """The reference of the data of ``run``: read from its folder, or made and kept there.

    Of at most ``most`` photos, or ``evaluation.photos`` (10,000 where the model works on latents), picked by a fixed
    seed.

    Raises:
        DataError: the data cannot be used. EvaluationError: the run folder cannot be written to.
    """
    config, index = run.config, run.index
    latents = config.data.vae is not None
    made_of: dict[str, Any] = {
        "data": index.digests,
        "made_with": index.made_with,
        "side": sample_side(config),
        "supersample": config.data.supersample,
        "network": network.identity,
        "photos": min(index.count, most or config.evaluation.photos, MOST_LATENT_PHOTOS if latents else index.count),
        "gallery": GALLERY_PHOTOS,
    }
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    part = "" if config.data.split == "train" else f"-{config.data.split}"
    path = config.run_dir / "evaluation" / f"reference-{network.name}{part}.npz"
    found = read_reference(path, digest)
    if found is None:
        # Prepared pixels are mapped: taken batch by batch, they are never in memory together.
        photos = run.photos(made_of["photos"] if latents else None)
        found = measure_photos(photos, made_of["photos"], made_of["side"], network, digest)
        write_reference(path, found)
    return found


def published_reference(path: Path, network: FeatureNetwork) -> Reference:
    """Of ADM's reference batches (``VIRTUAL_imagenet256_labeled.npz`` and its like), for an Inception network.

    ``mu``, ``sigma``, ``mu_s``, ``sigma_s`` are the moments of the whole training set; ``arr_0`` uint8
    ``[N, H, W, 3]`` are the photos that precision and recall compare with.

    Raises:
        EvaluationError: the file is missing, or lacks one of these.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            moments = [torch.from_numpy(archive[key]).double() for key in ("mu", "sigma", "mu_s", "sigma_s")]
            photos = archive["arr_0"][:GALLERY_PHOTOS]
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise EvaluationError(f"evaluation.reference {path}: expected an npz with mu, sigma, mu_s, sigma_s and arr_0, "
                              f"as ADM publishes ({one_line(error)})") from error  # fmt: skip
    mean, covariance, spatial_mean, spatial_covariance = moments
    parts = []
    with tracked(range(0, len(photos), _BATCH), f"reference photos through {network.name}") as starts:
        for start in starts:
            batch = torch.from_numpy(photos[start : start + _BATCH]).permute(0, 3, 1, 2).float() / 127.5 - 1
            parts.append(network(batch))
    together = Features(torch.cat([each.pool for each in parts]), torch.cat([each.logits for each in parts]))
    count = len(photos)
    return Reference(
        str(path),
        Moments(count, mean, covariance),
        Moments(count, spatial_mean, spatial_covariance),
        gallery_of(together, torch.zeros(count, dtype=torch.long)),
    )


def measure_photos(dataset: ImageDataset, count: int, side: int, network: FeatureNetwork, digest: str) -> Reference:
    """Run ``network`` over the centre crops of ``count`` photos of ``dataset``, picked by a fixed seed.

    Features of no more than the gallery are ever in memory.
    """
    picked = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:count]
    in_gallery = torch.zeros(len(dataset), dtype=torch.bool)
    in_gallery[picked[:GALLERY_PHOTOS]] = True
    picked = picked.sort().values  # in the order in which they lie on disk
    pool, spatial = RunningMoments(), RunningMoments()
    parts: list[Features] = []
    with tracked(torch.split(picked, _BATCH), f"photos through {network.name}") as batches:
        for rows in batches:
            photos = ImageDataset(dataset.images[rows], dataset.labels[rows], dataset.supersample)
            # Networks see RGB: grey is three equal channels.
            features = network(centre_images(photos, side).expand(-1, 3, -1, -1))
            pool.add(features.pool)
            if features.spatial is not None:
                spatial.add(features.spatial)
            chosen = in_gallery[rows]
            parts.append(Features(features.pool[chosen], features.logits[chosen]))
    together = Features(torch.cat([each.pool for each in parts]), torch.cat([each.logits for each in parts]))
    has_spatial = spatial.count > 0
    return Reference(
        digest,
        pool.result(),
        spatial.result() if has_spatial else None,
        gallery_of(together, dataset.labels[in_gallery]),
    )


def write_reference(path: Path, found: Reference) -> None:
    """Raises:
    EvaluationError: it cannot be written.
    """
    arrays = {
        "digest": np.array(found.digest),
        "count": np.array(found.pool.count),
        "mean": found.pool.mean.numpy(),
        "covariance": found.pool.covariance.numpy(),
        "features": found.gallery.features.numpy(),
        "labels": found.gallery.labels.numpy(),
        "top5": found.gallery.top5.numpy(),
    }
    if found.spatial is not None:
        arrays |= {"spatial_mean": found.spatial.mean.numpy(), "spatial_covariance": found.spatial.covariance.numpy()}
    try:
        with replacing(path) as temporary, temporary.open("wb") as stream:
            np.savez(stream, **arrays)  # type: ignore[arg-type]  # its stub knows no mapping of arrays
    except OSError as error:
        raise EvaluationError(
            f"{path}: cannot be written ({one_line(error)}); free some space and run again"
        ) from error


def read_reference(path: Path, digest: str) -> Reference | None:
    """What :func:`write_reference` wrote for ``digest``; none if it is of anything else, damaged or not there."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            if str(archive["digest"]) != digest:
                return None
            arrays = {name: archive[name] for name in archive.files}
        tensors: dict[str, Tensor] = {
            name: torch.from_numpy(array) for name, array in arrays.items() if name not in ("digest", "count")
        }
        count = int(arrays["count"])
        spatial = None
        if "spatial_mean" in tensors:
            spatial = Moments(count, tensors["spatial_mean"], tensors["spatial_covariance"])
        gallery = Gallery(tensors["features"], tensors["labels"], tensors["top5"])
        return Reference(digest, Moments(count, tensors["mean"], tensors["covariance"]), spatial, gallery)
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        return None
