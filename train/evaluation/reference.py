"""What the training photos look like to a feature network; kept in the run folder, as it takes long to find."""

from __future__ import annotations

import hashlib
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robuq_core.files import replacing
from train.data import ImageDataset, image_size, to_unit
from train.evaluation.figures import Gallery, Moments, RunningMoments, best_five
from train.evaluation.networks import EvaluationError, FeatureNetwork
from train.logs import one_line, tracked
from train.run import Run

MOST_LATENT_PHOTOS = 10_000  # a run on latents keeps no pixels: its photos are decoded afresh, into memory
GALLERY_PHOTOS = 10_000
_BATCH = 64


@dataclass(frozen=True)
class Reference:
    """Of the training photos: moments of ``pool`` and, where the network has them, ``spatial`` features; a random part
    of the photos themselves as ``gallery``."""

    pool: Moments
    spatial: Moments | None
    gallery: Gallery


def reference(run: Run, network: FeatureNetwork, most: int | None = None) -> Reference:
    """The reference of the data of ``run``: read from its folder, or made and kept there.

    Of at most ``most`` photos, or ``evaluation.photos`` (10,000 where the model works on latents), picked by a fixed
    seed. Raises DataError if the data cannot be used, EvaluationError if the run folder cannot be written to.
    """
    config, index = run.config, run.index
    latents = config.data.vae is not None
    count = min(index.count, most or config.evaluation.photos, MOST_LATENT_PHOTOS if latents else index.count)
    made_of = (index.digests, index.made_with, image_size(config), network.identity, count, GALLERY_PHOTOS)
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    part = "" if config.data.split == "train" else f"-{config.data.split}"
    path = config.run_dir / "evaluation" / f"reference-{network.name}{part}.npz"
    found = read_reference(path, digest)
    if found is None:
        # Prepared pixels are mapped: taken batch by batch, they are never in memory together.
        found = measure_photos(run.photos(count if latents else None), count, network)
        write_reference(path, found, digest)
    return found


def published_reference(path: Path, network: FeatureNetwork) -> Reference:
    """Of ADM's reference batches (``VIRTUAL_imagenet256_labeled.npz`` and its like), for an Inception network.

    ``mu``, ``sigma``, ``mu_s``, ``sigma_s`` are the moments of the whole training set; ``arr_0`` uint8
    ``[N, H, W, 3]`` are the photos that precision and recall compare with. Raises EvaluationError without them.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            moments = [torch.from_numpy(archive[key]).double() for key in ("mu", "sigma", "mu_s", "sigma_s")]
            photos = torch.from_numpy(archive["arr_0"][:GALLERY_PHOTOS]).permute(0, 3, 1, 2)
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise EvaluationError(f"evaluation.reference {path}: expected an npz with mu, sigma, mu_s, sigma_s and arr_0, "
                              f"as ADM publishes ({one_line(error)})") from error  # fmt: skip
    count = len(photos)
    seen = measure_photos(ImageDataset(photos, torch.zeros(count, dtype=torch.long)), count, network)
    return Reference(Moments(count, *moments[:2]), Moments(count, *moments[2:]), seen.gallery)


def measure_photos(dataset: ImageDataset, count: int, network: FeatureNetwork) -> Reference:
    """Run ``network`` over ``count`` photos of ``dataset``, picked by a fixed seed.

    Features of no more than the gallery are ever in memory.
    """
    picked = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:count]
    in_gallery = torch.zeros(len(dataset), dtype=torch.bool)
    in_gallery[picked[:GALLERY_PHOTOS]] = True
    picked = picked.sort().values  # in the order in which they lie on disk
    pool, spatial = RunningMoments(), RunningMoments()
    pools, top5 = list[Tensor](), list[Tensor]()
    with tracked(torch.split(picked, _BATCH), f"photos through {network.name}") as batches:
        for rows in batches:
            # Networks see RGB: grey is three equal channels.
            features = network(to_unit(dataset.images[rows]).expand(-1, 3, -1, -1))
            pool.add(features.pool)
            if features.spatial is not None:
                spatial.add(features.spatial)
            chosen = in_gallery[rows]
            pools.append(features.pool[chosen])
            top5.append(best_five(features.logits[chosen]))
    gallery = Gallery(torch.cat(pools), dataset.labels[in_gallery], torch.cat(top5))
    return Reference(pool.result(), spatial.result() if spatial.count else None, gallery)


def write_reference(path: Path, found: Reference, digest: str) -> None:
    """Raises EvaluationError if it cannot be written."""
    arrays: dict[str, Any] = {"digest": digest, "count": found.pool.count}
    for name, moments in (("", found.pool), ("spatial_", found.spatial)):
        if moments is not None:
            arrays |= {f"{name}mean": moments.mean, f"{name}covariance": moments.covariance}
    arrays |= {"features": found.gallery.features, "labels": found.gallery.labels, "top5": found.gallery.top5}
    try:
        with replacing(path) as temporary, temporary.open("wb") as stream:
            np.savez(stream, **{name: np.asarray(value) for name, value in arrays.items()})  # type: ignore[arg-type]
    except OSError as error:
        raise EvaluationError(f"{path}: cannot be written ({one_line(error)}); free some space and run again"
                              ) from error  # fmt: skip


def read_reference(path: Path, digest: str) -> Reference | None:
    """What :func:`write_reference` wrote for ``digest``; none if it is of anything else, damaged or not there."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            if str(archive["digest"]) != digest:
                return None
            count = int(archive["count"])
            tensors = {name: torch.from_numpy(archive[name]) for name in archive.files if archive[name].ndim}
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        return None
    if not tensors.keys() >= {"mean", "covariance", "features", "labels", "top5"}:
        return None
    spatial = None
    if "spatial_mean" in tensors:
        spatial = Moments(count, tensors["spatial_mean"], tensors["spatial_covariance"])
    gallery = Gallery(tensors["features"], tensors["labels"], tensors["top5"])
    return Reference(Moments(count, tensors["mean"], tensors["covariance"]), spatial, gallery)
