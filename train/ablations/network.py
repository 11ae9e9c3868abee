"""The feature network: a small convolutional classifier, trained on the study's own data with a fixed seed.

Distances on its features are comparable within a study and with nothing else; they are no FID.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robuq_core.files import replacing
from train.ablations.config import ClassifierConfig
from train.ablations.dataset import GreyImages, to_unit
from train.data import step_generator
from train.evaluation.frechet import Moments, RunningMoments
from train.messages import one_line
from train.state_file import StateError

FEATURES = 128
_BATCH = 500


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """What fails while ``path``, a piece of a study, is read.

    Raises:
        StateError: the file is damaged.
    """
    try:
        yield
    except Exception as error:  # a damaged file leads its reader to raise almost anything
        raise StateError(
            f"{path}: not a whole piece of a study ({one_line(error)}); delete it, and it is made again"
        ) from error


class FeatureClassifier(nn.Module):
    """Two convolutions, two linears: ``[N, 1, S, S]`` in [-1, 1] -> features ``[N, 128]``, logits ``[N, classes]``."""

    def __init__(self, size: int, num_classes: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.hidden = nn.Linear(32 * (size // 4) ** 2, FEATURES)
        self.head = nn.Linear(FEATURES, num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = F.max_pool2d(F.relu(self.conv1(images)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        features = F.relu(self.hidden(x.flatten(1)))
        return features, self.head(features)

    @torch.inference_mode()
    def moments_and_verdicts(self, images: Tensor) -> tuple[Moments, Tensor]:
        """Moments of the features, and the class that each of ``images`` (float, in [-1, 1]) looks like, ``[N]``."""
        moments, verdicts = RunningMoments(), []
        for batch in torch.split(images, _BATCH):
            features, logits = self(batch)
            moments.add(features)
            verdicts.append(logits.argmax(dim=1))
        return moments.result(), torch.cat(verdicts)


def train_classifier(data: GreyImages, config: ClassifierConfig) -> FeatureClassifier:
    """Cross-entropy by Adam with a cosine rate; the same weights every time on one machine."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = FeatureClassifier(data.train.shape[-1], data.num_classes)
    steps = config.epochs * (len(data.train) // config.batch_size)
    optimiser = torch.optim.Adam(network.parameters(), lr=config.lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, steps))
    step = 0
    for epoch in range(config.epochs):
        order = torch.randperm(len(data.train), generator=step_generator(0, epoch, stream=7))
        for index in torch.split(order, config.batch_size)[: steps // config.epochs]:
            _, logits = network(to_unit(data.train[index]))
            F.cross_entropy(logits, data.train_labels[index]).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            schedule.step()
            step += 1
    return network.eval()


def prepare_network(data: GreyImages, config: ClassifierConfig, path: Path) -> dict[str, Any]:
    """The content of ``path``, made first if it is not there: ``weights``, ``moments`` of the training images,
    and ``accuracy`` on the test images."""
    if path.exists():
        with readable(path):
            content: dict[str, Any] = torch.load(path, weights_only=True)
        return content
    network = train_classifier(data, config)
    reference, _ = network.moments_and_verdicts(to_unit(data.train))
    _, verdicts = network.moments_and_verdicts(to_unit(data.test))
    content = {
        "weights": network.state_dict(),
        "count": reference.count,
        "mean": reference.mean,
        "covariance": reference.covariance,
        "accuracy": float((verdicts == data.test_labels).float().mean()),
    }
    with replacing(path) as temporary:
        torch.save(content, temporary)
    return content


def load_network(content: dict[str, Any], size: int, num_classes: int) -> tuple[FeatureClassifier, Moments]:
    """The classifier and the training images' moments from what :func:`prepare_network` gives."""
    network = FeatureClassifier(size, num_classes)
    network.load_state_dict(content["weights"])
    return network.eval(), Moments(content["count"], content["mean"], content["covariance"])
