"""How the class table of a new teacher starts."""

from __future__ import annotations

import torch
from torch import Tensor

from robuq_core.models.dit import DiT
from train.config import TrainConfig
from train.data import Dataset, LatentDataset, centre_images

# A principal component below this share of the first is rounding noise.
_NEGLIGIBLE = 1e-9
_ROWS = 256  # samples in memory at a time


@torch.no_grad()
def initialise_class_table(model: DiT, config: TrainConfig, dataset: Dataset) -> None:
    """Spread the class table as ``class_init`` asks: Gaussian, or principal components of the class means.

    ``pca`` gives classes with like images like codes, so that what is learnt of one serves the others. The
    components are weighted by the fourth root of their standard deviation: the leading ones still lead, and the
    fine ones stay above the noise of a 4-bit adaLN input. Overall spread: ``class_init_std``.
    """
    table = model.y_embedder.embedding_table.weight
    if config.class_init == "normal":
        torch.nn.init.normal_(table, std=config.class_init_std)
        return
    codes = _principal_codes(_class_means(dataset, config), table.shape[1])
    table.zero_()
    table[: len(codes), : codes.shape[1]] = codes / codes.std() * config.class_init_std


def _class_means(dataset: Dataset, config: TrainConfig) -> Tensor:
    sums: Tensor | None = None
    for first in range(0, len(dataset), _ROWS):
        rows = slice(first, first + _ROWS)
        if isinstance(dataset, LatentDataset):
            samples = dataset.means(rows)
        else:
            samples = centre_images(dataset, config.model.input_size, rows)
        flat = samples.flatten(1).double()
        if sums is None:
            sums = flat.new_zeros(config.model.num_classes, flat.shape[1])
        sums.index_add_(0, dataset.labels[rows], flat)
    assert sums is not None
    counts = torch.bincount(dataset.labels, minlength=config.model.num_classes)
    return sums / counts.clamp(min=1)[:, None]


def _principal_codes(means: Tensor, width: int) -> Tensor:
    centred = means - means.mean(dim=0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    kept = min(width, int((s > _NEGLIGIBLE * s[0]).sum()))
    # The SVD leaves each component's sign open; fix it, so that a run does not depend on the LAPACK build.
    u = u * u.gather(0, u.abs().argmax(dim=0, keepdim=True)).sign()
    codes: Tensor = u[:, :kept] * s[:kept] ** 0.25
    return codes.float()
