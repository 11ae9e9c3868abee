"""The figures of one set of samples, by feature network."""

from __future__ import annotations

import torch
from torch import Tensor

from train.evaluation.agreement import nearest_labels
from train.evaluation.frechet import RunningMoments, frechet_distance_of_moments
from train.evaluation.inception import fid, inception_score, precision_and_recall, sfid
from train.evaluation.networks import FeatureNetwork
from train.evaluation.reference import Reference
from train.evaluation.samples import SampleSet

_BATCH = 64


def effnet_figures(samples: SampleSet, network: FeatureNetwork, reference: Reference) -> dict[str, float]:
    """``fd_effnet``: Fréchet distance of EfficientNet-Lite0 features (no FID: other features, other scale).
    ``nearest``: share of samples whose nearest photo is of the asked class."""
    moments, right = RunningMoments(), 0
    for first in range(0, len(samples), _BATCH):
        features = network(samples.batch(first, _BATCH))
        moments.add(features.pool)
        wanted = torch.from_numpy(samples.labels[first : first + _BATCH])
        right += int((nearest_labels(features.pool, reference.gallery) == wanted).sum())
    distance = frechet_distance_of_moments(moments.result(), reference.pool)
    return {"fd_effnet": distance, "nearest": right / len(samples)}


def inception_figures(samples: SampleSet, network: FeatureNetwork, reference: Reference) -> dict[str, float]:
    """``fid``, ``sfid``, ``inception_score``, ``precision``, ``recall``; see :mod:`train.evaluation.inception`."""
    pool, spatial = RunningMoments(), RunningMoments()
    pools: list[Tensor] = []
    logits: list[Tensor] = []
    for first in range(0, len(samples), _BATCH):
        features = network(samples.batch(first, _BATCH))
        pool.add(features.pool)
        pools.append(features.pool)
        logits.append(features.logits)
        assert features.spatial is not None
        spatial.add(features.spatial)
    assert reference.spatial is not None
    precision, recall = precision_and_recall(torch.cat(pools), reference.gallery.features)
    return {
        "fid": fid(pool.result(), reference.pool),
        "sfid": sfid(spatial.result(), reference.spatial),
        "inception_score": inception_score(torch.cat(logits)),
        "precision": precision,
        "recall": recall,
    }
