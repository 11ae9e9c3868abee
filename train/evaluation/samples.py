"""Samples of whatever a run has made (teacher, fake-quantised student or packed file): in memory, on disk, as a sheet.

On disk they are generated batch by batch by all processes, and continued after a kill.
"""

from __future__ import annotations

import json
import math
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import numpy as np
import torch
from PIL import Image
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional as F

from robuq_core.checkpoint import FORMAT_VERSION, Header
from robuq_core.config import MAX_SEED, SamplerConfig, image_seed
from robuq_core.decode import load_decoder
from robuq_core.files import read_json, replacing
from robuq_core.models.dit import DiT
from robuq_core.pipeline import Sampler
from train import parallel
from train.config import TrainConfig
from train.data import ShardedTensor, image_size, to_unit
from train.evaluation.figures import Moments, RunningMoments, frechet_distance
from train.evaluation.networks import EvaluationError, FeatureNetwork, Features
from train.logs import one_line
from train.run import Run
from train.state import file_digest, read_state
from train.trainer import autocast

_BATCH = 64
Which = Literal["teacher", "student", "packed"]
MODELS: tuple[Which, ...] = get_args(Which)
_STAGES: dict[str, str] = {"teacher": "teacher", "student": "qat", "packed": "export"}
SHEET_IMAGES, SHEET_COLUMNS, SHEET_SIDE, SHEET_GAP = 64, 8, 96, 2


class _Autocast(nn.Module):
    """A network as training runs it on a GPU: compiled, and in bf16 where ``precision`` allows it."""

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        super().__init__()
        self._forward = torch.compile(model, dynamic=True) if config.compile else model
        self._precision = config.precision

    def forward(self, *arguments: Tensor) -> Tensor:
        with autocast(self._precision, arguments[0].device):
            output: Tensor = self._forward(*arguments)
        return output.float()


def plain_sampler(model: DiT, config: TrainConfig, name: str) -> Sampler:
    """A sampler that runs ``model`` itself (teacher or fake-quantised student), not a packed file; on a GPU if any."""
    device = parallel.training_device()
    decoder = None if config.data.vae is None else load_decoder(config.data.vae, device=device)
    # Not checked: of what runs unpacked, the quantiser may be one that cannot be packed.
    header = Header.model_construct(
        format_version=FORMAT_VERSION,
        model=config.model,
        quant=config.quant,
        diffusion=config.diffusion,
        sampler=config.sampler,
        decoder="pixels" if decoder is None else "latent",
        tensors={},
    )
    network: nn.Module = model.eval().to(device)
    if device.type == "cuda":
        network = _Autocast(network, config)
    size = sum(parameter.nbytes for parameter in model.parameters())
    return Sampler(network, header, checkpoint_name=name, backend_name="torch", weight_bytes=size, device=device,
                   decoder=decoder)  # fmt: skip


def default_model(run: Run) -> Which:
    """The last that ``run`` has made."""
    return next((which for which in reversed(MODELS) if run.path(_STAGES[which]).exists()), "teacher")


def load_sampler(run: Run, which: str, checkpoint: Path | None = None) -> tuple[Sampler, str]:
    """The sampler of ``which``, and what identifies its weights: the SHA-256 of a packed file, or a state's digest.

    ``checkpoint``: a packed file elsewhere, or the folder of a kept state of ``which``. Raises StateError or
    CheckpointError if the file is missing or damaged, EvaluationError if it is of another shape.
    """
    if which not in MODELS:
        raise EvaluationError(f"--model {which}: choose one of {', '.join(MODELS)}")
    config = run.config
    kept = checkpoint if checkpoint is not None and checkpoint.is_dir() else None
    if which == "packed" or (checkpoint is not None and kept is None):
        path = checkpoint or run.path("export")
        sampler, digest = Sampler.from_checkpoint(path, decoder=config.data.vae), file_digest(path)
    else:
        model, settings = (run.student(kept), run.resolved) if which == "student" else (run.teacher(kept), config)
        sampler = plain_sampler(model, settings, which)
        digest = run.digest(_STAGES[which]) if kept is None else read_state(kept).digest
    classes, side = config.model.num_classes, image_size(config)
    if (sampler.image_size, sampler.num_classes) != (side, classes):
        raise EvaluationError(f"{sampler.checkpoint_name} generates {sampler.image_size} px and {sampler.num_classes} "
                              f"classes, but the configuration has {side} px and {classes}: give the one it was "
                              "trained with")  # fmt: skip
    return sampler, digest


def random_classes(count: int, num_classes: int, seed: int) -> list[int]:
    """``count`` different classes in random order, or all of them if there are fewer."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(num_classes, generator=generator)[:count].tolist()


def balanced_classes(count: int, num_classes: int, seed: int) -> list[int]:
    """``count`` classes in random order, each as often as any other but for one."""
    generator = torch.Generator().manual_seed(seed)
    rounds = -(-count // num_classes)
    classes = torch.cat([torch.randperm(num_classes, generator=generator) for _ in range(rounds)])[:count]
    return classes[torch.randperm(count, generator=generator)].tolist()


def first_seed(seed: int) -> int:
    """The seed of sample 0 of set ``seed``; sample i has the i-th after it. Neighbouring sets lie far apart."""
    return int(np.random.SeedSequence(seed).generate_state(1)[0])


def generate(
    sampler: Sampler,
    classes: Sequence[int],
    seed: int,
    settings: SamplerConfig | None = None,
    batch_size: int = _BATCH,
) -> Tensor:
    """One sample a class, float32 in [-1, 1] ``[N, 3, S, S]``; sample i uses ``seed + i``."""
    chosen, parts = settings or sampler.defaults, []
    for first in range(0, len(classes), batch_size):
        parts.append(_draw_batch(sampler, classes[first : first + batch_size], image_seed(seed, first), chosen))
    return as_unit(torch.from_numpy(np.concatenate(parts)))


def _draw_batch(sampler: Sampler, classes: Sequence[int], seed: int, settings: SamplerConfig) -> np.ndarray:
    """Uint8 ``[N, S, S, 3]``."""
    images: list[Image.Image] = sampler.generate(
        classes, seed, steps=settings.steps, guidance_scale=settings.guidance_scale, sampler=settings.sampler
    )
    return np.stack([np.asarray(image) for image in images])


def as_unit(images: Tensor) -> Tensor:
    """uint8 ``[N, H, W, 3]`` as float32 ``[N, 3, H, W]`` in [-1, 1]."""
    return to_unit(images.permute(0, 3, 1, 2))


def small_distance(
    sampler: Sampler,
    settings: SamplerConfig,
    count: int,
    seed: int,
    network: FeatureNetwork | None,
    photos: Moments | None,
) -> float:
    """Fréchet distance to ``photos`` of ``count`` samples, without keeping them.

    Every process generates all of them (the forwards of a sharded model are everyone's); where there is no ``network``
    nothing is measured and the result is nan.
    """
    classes, moments = balanced_classes(count, sampler.valid_classes, seed), RunningMoments()
    for first in range(0, count, _BATCH):
        samples = generate(sampler, classes[first : first + _BATCH], (seed << 16) + first, settings)
        if network is not None:
            moments.add(network(samples).pool)
    return math.nan if photos is None else frechet_distance(moments.result(), photos)


@dataclass(frozen=True)
class SampleSet:
    """``images`` uint8 ``[N, H, W, 3]``, mapped from ``files``, one per batch; ``labels`` int64 ``[N]``."""

    files: Sequence[Path]
    images: ShardedTensor
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def store_features(self, network: FeatureNetwork) -> None:
        """Store the features of each batch beside it; every process of a run calls this and computes its share."""

        def write(i: int, stream: BinaryIO) -> None:
            found = vars(network(as_unit(torch.from_numpy(np.load(self.files[i])))))
            arrays: dict[str, Any] = {name: np.asarray(each) for name, each in found.items() if each is not None}
            np.savez(stream, **arrays)

        _write_share([_features_of(file, network) for file in self.files], write, f"samples through {network.name}")

    def features(self, network: FeatureNetwork) -> Iterator[Features]:
        """Of each batch in order, once :meth:`store_features` has stored them."""
        for file in self.files:
            with np.load(_features_of(file, network), allow_pickle=False) as stored:
                yield Features(**{name: torch.from_numpy(stored[name]) for name in stored.files})

    def write_npz(self, path: Path) -> None:
        """The layout that ADM's evaluation reads: ``arr_0`` uint8 ``[N, H, W, 3]``, ``arr_1`` labels ``[N]``."""
        header = {"descr": "|u1", "fortran_order": False, "shape": tuple(self.images.shape)}
        with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for first in range(0, len(self), _BATCH):
                    member.write(self.images[first : first + _BATCH].numpy().tobytes())
            with archive.open("arr_1.npy", "w") as member:
                np.save(member, self.labels)


def generate_to_disk(
    sampler: Sampler,
    folder: Path,
    *,
    count: int,
    seed: int,
    batch_size: int,
    identity: str,
    settings: SamplerConfig,
) -> SampleSet:
    """``count`` samples of balanced classes in ``folder``, a file a batch: generated, continued, or found complete.

    Every process of a run generates its share of the batches, each sample by its own seed: how many they are changes
    nothing, and an interrupted call may be continued by another number.

    ``identity`` names the weights: samples of others, or generated with other ``settings``, are replaced. Raises
    EvaluationError if the folder cannot be written to.
    """
    described = {
        "identity": identity,
        "count": count,
        "seed": seed,
        "side": sampler.image_size,
        "batch_size": batch_size,
        "num_classes": sampler.num_classes,
        "sampler": settings.model_dump(mode="json"),
    }
    labels = np.array(balanced_classes(count, sampler.valid_classes, seed), dtype=np.int64)
    files = [folder / f"{start:07d}.npy" for start in range(0, count, batch_size)]
    parallel.on_first(lambda: _prepare_folder(folder, described))

    def write(i: int, stream: BinaryIO) -> None:
        start = i * batch_size
        classes = labels[start : start + batch_size].tolist()
        np.save(stream, _draw_batch(sampler, classes, (first_seed(seed) + start) % (MAX_SEED + 1), settings))

    _write_share(files, write, f"sampling {sampler.checkpoint_name}, seed {seed}")
    return SampleSet(files, ShardedTensor(files), labels)


def _features_of(file: Path, network: FeatureNetwork) -> Path:
    return file.with_name(f"{file.stem}-{network.identity}.npz")


def _write_share(files: Sequence[Path], write: Callable[[int, BinaryIO], None], about: str) -> None:
    """Call ``write(i, stream)`` for each file i that is missing; every process writes its share, and waits for all."""
    rank, world = parallel.rank(), parallel.world_size()
    mine = [i for i, file in enumerate(files) if i % world == rank and not file.exists()]
    try:
        with Progress(disable=rank > 0) as progress:
            for i in progress.track(mine, description=about):
                with replacing(files[i]) as temporary, temporary.open("wb") as stream:
                    write(i, stream)
    except OSError as error:
        raise _unwritable(files[0].parent, error) from error
    parallel.on_first(lambda: None)


def _prepare_folder(folder: Path, described: dict[str, Any]) -> None:
    """Empty ``folder``, unless what is in it is as ``described``."""
    about = folder / "about.json"
    try:
        found = read_json(about)
    except (OSError, ValueError):
        found = None
    try:
        if found != described:
            shutil.rmtree(folder, ignore_errors=True)
            with replacing(about) as temporary:
                temporary.write_text(json.dumps(described))
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: OSError) -> EvaluationError:
    return EvaluationError(f"{folder}: samples cannot be written ({one_line(error)}); free some space and run again: "
                           "what is generated is kept")  # fmt: skip


def write_sheet(samples: Tensor, path: Path) -> None:
    """The first 64 of ``samples [N, 3, S, S]`` in [-1, 1] as one PNG of eight columns on white.

    Small ones are enlarged by whole pixels: a smooth upscale would flatter.
    """
    first = samples[:SHEET_IMAGES]
    images = F.interpolate(first, scale_factor=max(1, SHEET_SIDE // first.shape[-1]))
    pixels = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    step, rows = images.shape[-1] + SHEET_GAP, -(-len(images) // SHEET_COLUMNS)
    sheet = Image.new("RGB", (SHEET_COLUMNS * step + SHEET_GAP, rows * step + SHEET_GAP), "white")
    for i, image in enumerate(pixels):
        row, column = divmod(i, SHEET_COLUMNS)
        sheet.paste(Image.fromarray(image), (SHEET_GAP + column * step, SHEET_GAP + row * step))
    with replacing(path) as temporary:
        sheet.save(temporary, format="PNG")
