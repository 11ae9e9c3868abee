"""Sampling: requests in, images out. :meth:`Sampler.step` advances any mix of rows by one denoising step.

A row's image depends only on the checkpoint and its own :class:`RowSpec`, not on the other rows: every operation of
the forward and the update keeps one order of float operations per row.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from robuq_core.checkpoint import Checkpoint, CheckpointError, Header, read_checkpoint, read_header
from robuq_core.classes import ClassNames
from robuq_core.config import PredictionType, check_fit
from robuq_core.decode import Decoder, PixelDecoder, load_decoder, to_pixels
from robuq_core.diffusion.update import Update, UpdatingBackend, add_learned_noise, guided_channels, update
from robuq_core.hub import DECODER_FOLDER, bundled_checkpoint, resolve_checkpoint
from robuq_core.images import image_settings
from robuq_core.kernels.backends import select_backend
from robuq_core.kernels.ops import Backend
from robuq_core.models.packed_dit import PackedDiT
from robuq_core.params import ALL_TIMESTEPS, ImageParams, RowSpec, check_spec, read_params
from robuq_core.rows import Batch, Inputs, Row, cached_forward, together
from robuq_core.staging import taken
from robuq_core.threads import on_one_thread

_NO_DECODER = (
    "a latent model without a decoder: give decoder (--decoder, ROBUQ_DECODER), a diffusers folder of the autoencoder "
    "that it was trained with, or put that folder next to the checkpoint as vae"
)

__all__ = ["ALL_TIMESTEPS", "Denoiser", "Row", "RowSpec", "Sampler", "Timings", "bundled_checkpoint"]


@dataclass(frozen=True)
class Timings:
    """Seconds that :meth:`Sampler.generate` took for all steps, and for decoding."""

    sampling_s: float
    decode_s: float


@dataclass(frozen=True)
class LoadedModel:
    """A verified checkpoint and its latent decoder, not yet on a device."""

    path: Path
    checkpoint: Checkpoint
    decoder: Decoder | None


def load_model(path: Path | str | None = None, decoder: Path | str | Decoder | None = None) -> LoadedModel:
    """Read a packed checkpoint and its decoder. Arguments and errors: as :meth:`Sampler.from_checkpoint`."""
    chosen = resolve_checkpoint(path)
    loaded: Decoder | None = None
    if read_header(chosen).decoder == "latent":  # before the weights, to report a missing decoder at once
        beside = chosen.parent / DECODER_FOLDER
        if decoder is None and not beside.is_dir():
            raise CheckpointError(f"{chosen}: {_NO_DECODER}")
        source = beside if decoder is None else decoder
        loaded = load_decoder(source) if isinstance(source, (str, Path)) else source
    return LoadedModel(chosen, read_checkpoint(chosen), loaded)


class Denoiser(Protocol):
    """A network that is not packed. ``x`` is on its device, the rest on the CPU."""

    def forward(self, x: Tensor, timesteps: Tensor, classes: Tensor, /) -> Tensor: ...


class Sampler:
    """Generates images with ``model``, which ``header`` describes.

    Not thread-safe: one thread calls :meth:`start`, :meth:`step` and :meth:`estimate`; :meth:`decode` and
    :meth:`decode_estimate` may be called from any.

    Args:
        backend_name, weight_bytes, device: of a ``model`` that is not packed.
        decoder: of a latent model; a pixel model needs none.

    ``image_size``: side of an image in pixels. ``timings``: of the latest :meth:`generate`. ``path``: of the packed
    checkpoint, if it was loaded from one.

    Raises:
        CheckpointError: a latent model without a decoder, or with one for other latents.
    """

    def __init__(
        self,
        model: PackedDiT | Denoiser,
        header: Header,
        *,
        checkpoint_name: str,
        backend_name: str = "torch",
        weight_bytes: int = 0,
        device: torch.device | str = "cpu",
        decoder: Decoder | None = None,
    ) -> None:
        self.model, self.header, self.checkpoint_name = model, header, checkpoint_name
        self.backend_name, self.weight_bytes, self.device = backend_name, weight_bytes, torch.device(device)
        self._update: Update = update
        if isinstance(model, PackedDiT):
            backend = model.backend
            self.backend_name, self.weight_bytes, self.device = backend.name, model.weight_bytes, model.device
            self._update = backend.update if isinstance(backend, UpdatingBackend) else update
        shape = header.model
        self.decoder = self._fitting(decoder)
        self.defaults = header.sampler
        self.class_names = header.class_names
        self.num_classes = shape.num_classes
        self.valid_classes = shape.valid_classes
        self.image_size = self.decoder.image_size(shape.input_size)
        self.average_activation_bits = header.average_activation_bits
        self.timings: Timings | None = None
        self.path: Path | None = None
        self._classes = ClassNames(header.class_names, shape.num_classes)
        self._shape = (shape.in_channels, shape.input_size, shape.input_size)
        self._guided_channels = guided_channels(shape.in_channels, shape.flavour)
        # In SiT's weights a second half of channels exists, but was not trained.
        self._learned_noise = shape.learn_sigma and self.prediction_type != "flow"
        self._has_own_threads = isinstance(model, PackedDiT) and model.has_own_threads

    def _fitting(self, decoder: Decoder | None) -> Decoder:
        channels = self.header.model.in_channels
        if self.header.decoder == "pixels":
            return PixelDecoder(self.device, channels)
        if decoder is None:
            raise CheckpointError(f"{self.checkpoint_name}: {_NO_DECODER}")
        if decoder.channels != channels:
            raise CheckpointError(f"{self.checkpoint_name}: has latents of {channels} channels, but the decoder "
                                  f"{decoder.name} takes {decoder.channels}; give the one it was trained "
                                  "with")  # fmt: skip
        return decoder

    @classmethod
    def from_checkpoint(
        cls,
        path: Path | str | None = None,
        *,
        decoder: Path | str | Decoder | None = None,
        backend: str = "auto",
        threads: int | None = None,
        device: torch.device | str | None = None,
    ) -> Sampler:
        """Load a packed checkpoint; ``None`` is the bundled one.

        Args:
            path: a file, a folder with one, or a hub id: see :func:`robuq_core.hub.resolve_checkpoint`.
            decoder: of a latent model: a folder (see :func:`robuq_core.decode.load_decoder`) or a loaded one; ``None``:
                the folder ``vae`` next to the file. Ignored for a pixel model.
            backend, threads, device: see :func:`robuq_core.kernels.backends.select_backend`.

        Raises:
            CheckpointError, DecoderError: the files cannot be used, or a latent model has no decoder.
            ValueError: unknown backend, or it does not run on ``device``.
        """
        return cls.from_loaded(load_model(path, decoder), backend=backend, threads=threads, device=device)

    @classmethod
    def from_loaded(
        cls,
        loaded: LoadedModel,
        *,
        backend: str = "auto",
        threads: int | None = None,
        device: torch.device | str | None = None,
    ) -> Sampler:
        """A sampler of what :func:`load_model` returned; see :meth:`from_checkpoint`."""
        return cls._on(loaded, select_backend(backend, threads, device))

    @classmethod
    def _on(cls, loaded: LoadedModel, ops: Backend) -> Sampler:
        header, dense, layers = loaded.checkpoint.header, loaded.checkpoint.dense, loaded.checkpoint.layers
        model = PackedDiT(header.model, dense, layers, ops, header.quant.attention_bits is not None)
        decoder = loaded.decoder and loaded.decoder.replica(ops.device)
        sampler = cls(model, header, checkpoint_name=loaded.path.stem, decoder=decoder)
        sampler.path = loaded.path
        return sampler

    @property
    def prediction_type(self) -> PredictionType:
        return self.header.diffusion.prediction_type

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hex, of the checkpoint's header, which contains the SHA-256 of every tensor."""
        return hashlib.sha256(self.header.model_dump_json().encode()).hexdigest()

    @property
    def can_guide(self) -> bool:
        """Whether a guidance_scale other than 1 is possible."""
        return self.header.model.can_guide

    def warm_up_rows(self, max_rows: int) -> tuple[int, ...]:
        """Batch sizes, in rows of the model and ascending, to run once before the first request."""
        return self.model.warm_up_rows(max_rows) if isinstance(self.model, PackedDiT) else (max_rows,)

    def start(self, spec: RowSpec, noise: Tensor | None = None) -> Row:
        """A new row at its first step: noise from its seed, or ``noise [C, H, W]``.

        Raises:
            ValueError: a field out of range, a sampler or guidance that the network does not support, or a cache
                interval above 1 for a network that is not packed.
        """
        classes = self.valid_classes
        if not 0 <= spec.class_id < classes:
            raise ValueError(f"class_id must be 0..{classes - 1}, not {spec.class_id}")
        check_spec(spec)
        check_fit(self.header.model, self.prediction_type, spec.sampler, spec.guidance_scale)
        if spec.cache_interval > 1 and not isinstance(self.model, PackedDiT):
            raise ValueError("cache_interval must be 1 for a network that is not packed")
        return Row(spec, self._shape, self.prediction_type, self.device, noise)

    def step(self, rows: Sequence[Row]) -> None:
        """Advance every row by one step with one forward.

        Rows may differ in class, timestep, step count, guidance and sampler. If it raises, no row has advanced.
        """
        learned, clip = self._learned_noise, self.header.diffusion.clip_sample
        with on_one_thread(self._has_own_threads):
            before = together(rows)
            output, block_deltas = self._output(rows, before.x)
            steps = [row.next_step(with_noise=not learned) for row in rows]
            after = Batch(*self._update(*before, output, steps, clip, self._guided_channels))
            if learned and (noises := {i: row.noise() for i, row in enumerate(rows) if row.needs_noise}):
                add_learned_noise(after.x, output, steps, noises)
        for i, row in enumerate(rows):
            row.advance(after, i, block_deltas.get(i))

    def _output(self, rows: Sequence[Row], x: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """The network's output for ``x [B, C, H, W]``, then for the guided rows again without a class; and the block
        deltas to keep, by position in ``rows``."""
        guided = [i for i, row in enumerate(rows) if row.guided]
        timesteps = [row.timestep for row in rows]
        classes = [row.spec.class_id for row in rows] + [self.header.model.null_row] * len(guided)
        if guided:
            timesteps += [timesteps[i] for i in guided]
            x = torch.cat([x, taken(x, guided)])
        if not isinstance(self.model, PackedDiT):
            with torch.inference_mode():
                return self.model.forward(x, torch.tensor(timesteps), torch.tensor(classes)), {}
        if any(row.spec.cache_interval > 1 for row in rows):
            return cached_forward(self.model, rows, [*range(len(rows)), *guided], Inputs(x, timesteps, classes))
        return self.model.forward(x, timesteps, classes), {}

    def decode(self, row: Row) -> np.ndarray:
        """The image of a row, uint8 ``[H, W, 3]``: ``127.5 x + 128``, clamped to 0..255, of the decoder's output.

        Raises:
            CheckpointError: as :meth:`decode_float`.
        """
        return to_pixels(self.decode_float(row.x))

    def decode_float(self, x: Tensor) -> Tensor:
        """The decoder's output for ``x [C, H, W]``, float32 ``[3, H', W']``.

        Raises:
            CheckpointError: values that are not finite, in ``x`` or in the image.
        """
        image = self.decoder.decode(x)
        if not bool(image.isfinite().all()):
            who = f"the decoder {self.decoder.name}" if bool(x.isfinite().all()) else "its network"
            raise CheckpointError(f"{self.checkpoint_name}: {who} outputs values that are not finite; run a decoder "
                                  "in float32, or export the file again")  # fmt: skip
        return image

    def estimate(self, row: Row) -> Tensor:
        """The clean image as predicted at the row's latest step, for :meth:`decode_estimate`; grey before the first
        step. Later steps do not change it."""
        return row.previous_x0

    def decode_estimate(self, estimate: Tensor) -> np.ndarray:
        """The image of an :meth:`estimate`, uint8 ``[H, W, 3]``. Errors: as :meth:`decode`."""
        return to_pixels(self.decode_float(estimate))

    def generate(
        self,
        class_ids: Sequence[int | str | None],
        seed: int | None = None,
        *,
        on_step: Callable[[], None] | None = None,
        **fields: Any,
    ) -> list[Image.Image]:
        """One image per class id or name, or per None for a network without classes; image i uses ``seed + i``.

        Args:
            seed, fields: of :class:`robuq_core.params.ImageParams`, such as ``steps`` or ``guidance_scale``; None takes
                the checkpoint's default. ``num_images`` is per class.
            on_step: called after each step, for a progress bar. :attr:`timings` has the duration.

        Raises:
            ValueError: an unknown field or class name, a value out of range, or ``class_ids`` is not a list.
        """
        if isinstance(class_ids, str):  # a sequence of its letters
            raise ValueError(f"class_ids must be a list: [{class_ids!r}], not {class_ids!r}")
        params = read_params(ImageParams, {"seed": seed, **fields}).resolved(self.defaults)
        classes = [self.class_id(class_id) for class_id in class_ids for _ in range(params.num_images)]
        rows = [self.start(params.spec(class_id, i)) for i, class_id in enumerate(classes)]
        began = time.perf_counter()
        self.finish(rows, on_step)
        sampled = time.perf_counter()
        images = [Image.fromarray(self.decode(row)) for row in rows]
        self.timings = Timings(sampled - began, time.perf_counter() - sampled)
        return images

    def settings_of(self, spec: RowSpec) -> dict[str, Any]:
        """The settings that :func:`robuq_core.images.encode_image` stores in the image of ``spec``."""
        names = self.class_names
        name = names[spec.class_id] if spec.class_id < len(names) else ""
        return image_settings(spec, self.checkpoint_name, name if self.num_classes else None)

    def class_id(self, class_id: int | str | None) -> int:
        """The class id of an id or a name; None, of a network without classes, is 0.

        Raises:
            ValueError: an unknown or ambiguous name, or None for a network with classes.
        """
        if class_id is None:
            if self.num_classes:
                raise ValueError(f"class_id must be 0..{self.num_classes - 1}, or a name: this network has classes")
            return 0
        return self._classes.resolve(class_id)

    def finish(self, rows: Sequence[Row], on_step: Callable[[], None] | None = None) -> None:
        """Step ``rows`` together until all are done; ``on_step`` is called after each step."""
        while running := [row for row in rows if not row.done]:
            self.step(running)
            if on_step is not None:
                on_step()
        self.synchronize()

    def synchronize(self) -> None:
        """Wait for the device, so that timings are real."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
