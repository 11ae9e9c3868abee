"""FID, sFID, Inception score, precision and recall, by torch-fidelity with a weight file that lies on this machine.

The library's Inception-v3 is the TensorFlow graph that the published figures come from, its resizing included. It has
no sFID: that is written here from its definition (arXiv 2103.03841; which activations, as ADM's evaluation takes them).
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from train.evaluation.errors import EvaluationError
from train.evaluation.frechet import Moments, frechet_distance_of_moments
from train.evaluation.networks import Features
from train.messages import one_line
from train.parallel import training_device

# Of the first branch of the sixth mixed block (17 x 17): 7 channels, 2,023 numbers, about as many as FID's 2,048.
_SPATIAL_LAYER, _SPATIAL_CHANNELS = "Mixed_6d.branch1x1", 7
_LAYERS = ["2048", "logits_unbiased"]
_BATCH = 32
SCORE_SPLITS = 10
NEIGHBOURS = 3
_PAIRS_AT_ONCE = 4096  # rows and columns of a block of the distance matrix

_OBTAIN = (
    "give torch-fidelity's own weight file, weights-inception-2015-12-05-6726825d.pth, with --inception PATH; nothing "
    "is downloaded here"
)


class SpatialProbe:
    """Keeps the first channels of the output of ``layer`` at each forward of its network, flattened ``[N, C H W]``."""

    def __init__(self, layer: nn.Module, channels: int = _SPATIAL_CHANNELS) -> None:
        self._channels = channels
        self._seen: Tensor | None = None
        layer.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self._seen = output[:, : self._channels].flatten(1).float()

    def take(self) -> Tensor:
        """What the latest forward gave."""
        seen, self._seen = self._seen, None
        if seen is None:
            raise RuntimeError("the network has not passed through its spatial layer")
        return seen


class Inception:
    """torch-fidelity's Inception-v3 with the weights of ``path``; a :class:`~train.evaluation.networks.FeatureNetwork`.

    Raises:
        EvaluationError: the library is not installed, or ``path`` holds no such weights.
    """

    name = "inception"

    def __init__(self, path: Path) -> None:
        extractor = _library("feature_extractor_inceptionv3").FeatureExtractorInceptionV3
        weights, digest = _read_weights(path)
        self.identity = f"inception-v3-{digest[:16]}"
        try:
            # The library would unpickle the file with all that it may hold: it is handed tensors alone.
            network = extractor("inception-v3-compat", _LAYERS, feature_extractor_weights_path=_as_file(weights))
        except (RuntimeError, TypeError, AttributeError) as error:
            raise EvaluationError(
                f"--inception {path}: not the weights of this Inception-v3 ({one_line(error)}); {_OBTAIN}"
            ) from error
        self.device = training_device()
        self.network: nn.Module = network.to(self.device)
        self._spatial = SpatialProbe(self.network.get_submodule(_SPATIAL_LAYER))

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Features:
        """See :class:`~train.evaluation.networks.FeatureNetwork`; the network takes whole pixel values."""
        parts = []
        for batch in torch.split(images, _BATCH):
            pixels = ((batch + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
            pool, logits = self.network(pixels.to(self.device))
            parts.append((pool.cpu(), logits.cpu(), self._spatial.take().cpu()))
        pools, logits, spatials = zip(*parts, strict=True)
        return Features(torch.cat(pools), torch.cat(logits), torch.cat(spatials))


def fid(samples: Moments, photos: Moments) -> float:
    """FID of the moments of pool features."""
    compare = _library("metric_fid").fid_statistics_to_metric
    return float(compare(_statistics(samples), _statistics(photos), verbose=False)["frechet_inception_distance"])


def sfid(samples: Moments, photos: Moments) -> float:
    """sFID: the Fréchet distance of spatial features."""
    return frechet_distance_of_moments(samples, photos)


def inception_score(logits: Tensor) -> float:
    """Mean over ten parts of ``exp(E KL(p(y|x) || p(y)))`` of unbiased ``logits [N, K]``."""
    score = _library("metric_isc").isc_features_to_metric(logits, splits=min(SCORE_SPLITS, len(logits)))
    return float(score["inception_score_mean"])


def precision_and_recall(samples: Tensor, photos: Tensor) -> tuple[float, float]:
    """Of pool features ``[N, F]`` and ``[M, F]``, each more than three: share of samples within the manifold of the
    photos, and the other way round; a manifold is the union of balls up to the third neighbour (arXiv 1904.06991)."""
    if min(len(samples), len(photos)) <= NEIGHBOURS:
        raise EvaluationError(f"precision and recall need more than {NEIGHBOURS} samples and photos, not "
                              f"{len(samples)} and {len(photos)}: raise evaluation.samples")  # fmt: skip
    measure = _library("metric_prc").calculate_precision_recall_part
    precision, recall = measure(samples, photos, neighborhood=NEIGHBOURS, batch_size=_PAIRS_AT_ONCE)
    return float(precision), float(recall)


def _statistics(moments: Moments) -> dict[str, Any]:
    return {"mu": moments.mean.numpy(), "sigma": moments.covariance.numpy()}


def _library(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f"torch_fidelity.{module}")
    # torchvision, which the library imports, raises RuntimeError beside a torch that it was not built for.
    except (ImportError, RuntimeError) as error:
        raise EvaluationError(f"--inception needs torch-fidelity and a torchvision that fits the installed torch "
                              f"({one_line(error)}); from a checkout: pip install '.[fid]'") from error  # fmt: skip


def _read_weights(path: Path) -> tuple[dict[str, Tensor], str]:
    if not path.is_file():
        raise EvaluationError(f"--inception {path}: no such file; {_OBTAIN}")
    try:
        content = path.read_bytes()
        weights = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if not isinstance(weights, dict) or not all(isinstance(each, Tensor) for each in weights.values()):
            raise ValueError("it holds more than tensors by name")
    except Exception as error:  # a foreign file leads the unpickler to raise almost anything
        raise EvaluationError(f"--inception {path}: not a file of weights ({one_line(error)}); {_OBTAIN}") from error
    return weights, hashlib.sha256(content).hexdigest()


def _as_file(weights: dict[str, Tensor]) -> io.BytesIO:
    stream = io.BytesIO()
    torch.save(weights, stream)
    stream.seek(0)
    return stream
