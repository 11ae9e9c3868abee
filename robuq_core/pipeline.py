"""Sampling: requests in, images out. :meth:`Sampler.step` advances any mix of rows by one denoising step.

A row's picture depends on the checkpoint and its own :class:`RowSpec` alone, not on the rows beside it: every op of
the forward and of the update keeps one order of float operations per row.

One file, since it is one class: how a model is loaded, stepped and decoded is what :class:`Sampler` is.
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
from robuq_core.diffusion.guidance import guided_channels
from robuq_core.diffusion.update import Update, UpdatingBackend, add_learned_noise, update
from robuq_core.hub import DECODER_FOLDER, bundled_checkpoint, resolve_checkpoint
from robuq_core.images import image_settings
from robuq_core.kernels.backends import select_backend
from robuq_core.kernels.ops import Backend
from robuq_core.models.packed_dit import PackedDiT
from robuq_core.openmp import on_one_thread
from robuq_core.params import ALL_TIMESTEPS, ImageParams, RowSpec, check_spec, read_params
from robuq_core.rows import Batch, Row, together
from robuq_core.staging import taken
from robuq_core.step_cache import cached_forward

NO_DECODER = (
    "it draws latents: give decoder (--decoder, ROBUQ_DECODER), a diffusers folder of the autoencoder that it was "
    "trained with, or put that folder beside the checkpoint as vae"
)

__all__ = ["ALL_TIMESTEPS", "Denoiser", "Row", "RowSpec", "Sampler", "Timings", "bundled_checkpoint"]


@dataclass(frozen=True)
class Timings:
    """Seconds that :meth:`Sampler.generate` took: for all steps, and apart from that for decoding the pictures."""

    sampling_s: float
    decode_s: float


@dataclass(frozen=True)
class LoadedModel:
    """A verified checkpoint and the decoder of its latents, before they are put on a device."""

    path: Path
    checkpoint: Checkpoint
    decoder: Decoder | None


def load_model(
    path: Path | str | None = None,
    decoder: Path | str | Decoder | None = None,
    device: torch.device | str = "cpu",
) -> LoadedModel:
    """Read a packed checkpoint and its decoder, the latter onto ``device``; arguments and errors as
    :meth:`Sampler.from_checkpoint`."""
    chosen = resolve_checkpoint(path)
    # The decoder first: a missing one is reported before the weights are read.
    loaded = _decoder_for(chosen, decoder, torch.device(device))
    return LoadedModel(chosen, read_checkpoint(chosen), loaded)


class Denoiser(Protocol):
    """What a sampler needs of a network, packed or plain: one forward. ``x`` on its device, the rest on the CPU."""

    def forward(self, x: Tensor, timesteps: Tensor, classes: Tensor, /) -> Tensor: ...


class Sampler:
    """Draws images with ``model``, which ``header`` describes.

    Not thread-safe: one owner calls :meth:`start`, :meth:`step` and :meth:`estimate`; :meth:`decode` and
    :meth:`decode_estimate` may be called from any thread.

    Args:
        device: where ``model`` takes its input and rows lie.
        decoder: of a ``header`` that says ``latent``; pixels need none.

    ``image_size`` is the side of a picture in pixels; ``timings`` of the latest :meth:`generate`.

    Raises:
        CheckpointError: a latent model without a decoder, or with one for other latents.
    """

    def __init__(
        self,
        model: Denoiser,
        header: Header,
        *,
        checkpoint_name: str,
        backend_name: str,
        weight_bytes: int,
        device: torch.device | str = "cpu",
        decoder: Decoder | None = None,
    ) -> None:
        self.model, self.header, self.device = model, header, torch.device(device)
        self.checkpoint_name, self.backend_name, self.weight_bytes = checkpoint_name, backend_name, weight_bytes
        self.decoder = self._fitting(decoder)
        self.defaults = header.sampler
        self.class_names = header.class_names
        self.num_classes = header.model.num_classes
        self.drawn_classes = header.model.drawn_classes
        self.image_size = self.decoder.image_size(header.model.input_size)
        self.average_activation_bits = header.average_activation_bits
        self.timings: Timings | None = None
        self.path: Path | None = None  # of the packed checkpoint, if it was loaded from one
        self._classes = ClassNames(header.class_names, header.model.num_classes)
        self._backend_choice = "auto"
        self._shape = (header.model.in_channels, header.model.input_size, header.model.input_size)
        backend = model.backend if isinstance(model, PackedDiT) else None
        self._update: Update = backend.update if isinstance(backend, UpdatingBackend) else update

    def _fitting(self, decoder: Decoder | None) -> Decoder:
        channels = self.header.model.in_channels
        if self.header.decoder == "pixels":
            return PixelDecoder(self.device, channels)
        if decoder is None:
            raise CheckpointError(f"{self.checkpoint_name}: {NO_DECODER}")
        if decoder.channels != channels:
            raise CheckpointError(f"{self.checkpoint_name}: draws latents of {channels} channels, but the decoder "
                                  f"{decoder.name} takes {decoder.channels}; "
                                  "give the one that the model was trained with")  # fmt: skip
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
            path: a file, a folder that holds one, or an id of the hub, as
                :func:`robuq_core.hub.resolve_checkpoint` takes them.
            decoder: of a model that draws latents: a folder, as :func:`robuq_core.decode.load_decoder` takes it, or
                what that gave. ``None`` takes the folder ``vae`` beside the file. A model that draws pixels needs
                none, and does not read it.
            backend, threads, device: as :func:`robuq_core.kernels.backends.select_backend` takes them.

        Raises:
            CheckpointError, DecoderError: what to load cannot be used, or a latent model has no decoder.
            ValueError: unknown backend, or it does not run on ``device``.
        """
        chosen = resolve_checkpoint(path)
        ops = select_backend(backend, threads, device)
        return cls._on(load_model(chosen, decoder, ops.device), ops, backend)

    @classmethod
    def from_loaded(
        cls,
        loaded: LoadedModel,
        *,
        backend: str = "auto",
        threads: int | None = None,
        device: torch.device | str | None = None,
    ) -> Sampler:
        """A sampler of what :func:`load_model` gave; the rest, and what it raises, as :meth:`from_checkpoint`."""
        return cls._on(loaded, select_backend(backend, threads, device), backend)

    @classmethod
    def _on(cls, loaded: LoadedModel, ops: Backend, backend_choice: str) -> Sampler:
        checkpoint = loaded.checkpoint
        attention_is_quantized = checkpoint.header.quant.attention_bits is not None
        model = PackedDiT(checkpoint.header.model, checkpoint.dense, checkpoint.layers, ops, attention_is_quantized)
        decoder = loaded.decoder and loaded.decoder.replica(ops.device)
        sampler = cls._of_packed(model, checkpoint.header, loaded.path.stem, backend_choice, decoder)
        sampler.path = loaded.path
        return sampler

    @classmethod
    def _of_packed(
        cls, model: PackedDiT, header: Header, name: str, backend_choice: str, decoder: Decoder | None
    ) -> Sampler:
        sampler = cls(
            model,
            header,
            checkpoint_name=name,
            backend_name=model.backend.name,
            weight_bytes=model.weight_bytes,
            device=model.device,
            decoder=decoder,
        )
        sampler._backend_choice = backend_choice
        return sampler

    def replica(self, *, threads: int | None = None, device: torch.device | str | None = None) -> Sampler:
        """A sampler for another thread or device: a backend of its own; on the same device, the same weights and the
        same decoder.

        Args:
            threads: of the native CPU backend; ``None`` takes torch's number.
            device: ``None`` stays on this sampler's.

        Raises:
            ValueError: this sampler does not run a packed checkpoint, or its backend does not run on ``device``.
        """
        if not isinstance(self.model, PackedDiT):
            raise ValueError(f"{self.checkpoint_name}: only a sampler of a packed checkpoint can be replicated")
        ops = select_backend(self._backend_choice, threads, self.device if device is None else device)
        return self._of_packed(self.model.replica(ops), self.header, self.checkpoint_name, self._backend_choice,
                               self.decoder.replica(ops.device))  # fmt: skip

    @property
    def prediction_type(self) -> PredictionType:
        """What the network predicts."""
        return self.header.diffusion.prediction_type

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hex, of the checkpoint's header, which has the SHA-256 of every tensor."""
        return hashlib.sha256(self.header.model_dump_json().encode()).hexdigest()

    @property
    def can_guide(self) -> bool:
        """Whether a guidance_scale other than 1 is possible."""
        return self.header.model.can_guide

    def warm_up_rows(self, max_rows: int) -> tuple[int, ...]:
        """Sizes, in rows of the model, that a forward should have seen before its first request, ascending."""
        return self.model.warm_up_rows(max_rows) if isinstance(self.model, PackedDiT) else (max_rows,)

    def start(self, spec: RowSpec, noise: Tensor | None = None) -> Row:
        """A new row at its first step: pure noise from its seed, or ``noise [C, H, W]`` instead.

        Raises:
            ValueError: class, seed, steps, guidance interval or cache interval out of range, a cache interval above 1
                for a network that is not packed, or a sampler or guidance that this network cannot be drawn with.
        """
        classes = self.header.model.drawn_classes
        if not 0 <= spec.class_id < classes:
            raise ValueError(f"class_id must be 0..{classes - 1}, not {spec.class_id}")
        check_spec(spec)
        check_fit(self.header.model, self.prediction_type, spec.sampler, spec.guidance_scale)
        if spec.cache_interval > 1 and not isinstance(self.model, PackedDiT):
            raise ValueError("cache_interval must be 1 for a network that is not packed")
        return Row(spec, self._shape, self.prediction_type, self.device, noise)

    @torch.inference_mode()
    def step(self, rows: Sequence[Row]) -> None:
        """Advance every row by one step with one forward.

        Rows may differ in class, timestep, step count, guidance and sampler. If it raises, no row has moved.
        """
        with on_one_thread(getattr(self.model, "has_own_threads", False)):
            self._step(rows)

    def _step(self, rows: Sequence[Row]) -> None:
        before = together(rows)
        output, block_deltas = self._output(rows, before.x)
        model, channels = self.header.model, self._shape[0]
        # A flow's second half of channels, where SiT's weights have one, was not trained.
        learned = model.learn_sigma and self.prediction_type != "flow"
        steps = [row.next_step(with_noise=not learned) for row in rows]
        clip = self.header.diffusion.clip_sample
        after = Batch(*self._update(*before, output, steps, clip, guided_channels(channels, model.flavour)))
        noises = {i: row.noise() for i, row in enumerate(rows) if learned and row.needs_noise}
        if noises:
            add_learned_noise(after.x, output, steps, noises)
        for i, row in enumerate(rows):
            row.advance(after, i, block_deltas.get(i))

    def _output(self, rows: Sequence[Row], x: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """The network's output for ``x [B, C, H, W]``, the rows' ``x_t``, after it that of the guided ones without a
        class, and by position the block deltas that rows are to keep."""
        guided = [i for i, row in enumerate(rows) if row.guided]
        timesteps = [row.timestep for row in rows]
        classes = [row.spec.class_id for row in rows] + [self.header.model.null_row] * len(guided)
        if guided:
            timesteps += [timesteps[i] for i in guided]
            x = torch.cat([x, taken(x, guided)])
        at, of = torch.tensor(timesteps), torch.tensor(classes)
        if isinstance(self.model, PackedDiT) and any(row.spec.cache_interval > 1 for row in rows):
            return cached_forward(self.model, rows, [*range(len(rows)), *guided], x, at, of)
        return self.model.forward(x, at, of), {}

    def decode(self, row: Row) -> np.ndarray:
        """Pixels of a row, uint8 ``[H, W, 3]``: ``127.5 x + 128``, cut to 0..255, of what the decoder gives.

        Raises:
            CheckpointError: as :meth:`decode_float`.
        """
        return to_pixels(self.decode_float(row.x))

    def decode_float(self, x: Tensor) -> Tensor:
        """The picture of ``x [C, H, W]`` as the decoder gives it, float32 ``[3, H', W']``.

        Raises:
            CheckpointError: values that are not finite, in ``x`` or in the picture.
        """
        if not bool(x.isfinite().all()):
            raise CheckpointError(f"{self.checkpoint_name}: its network gives values that are not finite; "
                                  "export the file again, or train on")  # fmt: skip
        picture = self.decoder.decode(x)
        if not bool(picture.isfinite().all()):
            raise CheckpointError(f"{self.checkpoint_name}: the decoder {self.decoder.name} gives values that are not "
                                  "finite; let it compute in float32")  # fmt: skip
        return picture

    def estimate(self, row: Row) -> Tensor:
        """The clean picture that the network saw behind the noise at the row's latest step, for
        :meth:`decode_estimate`; a snapshot that later steps leave alone. Grey before the first step."""
        return row.previous_x0

    def decode_estimate(self, estimate: Tensor) -> np.ndarray:
        """Pixels of what :meth:`estimate` gave, uint8 ``[H, W, 3]``. Errors: as :meth:`decode`."""
        return to_pixels(self.decode_float(estimate))

    def generate(
        self,
        class_ids: Sequence[int | str | None],
        seed: int | None = None,
        *,
        on_step: Callable[[], None] | None = None,
        **fields: Any,
    ) -> list[Image.Image]:
        """One image for each class, given by its id or its name, or None where the network has no classes; image i
        uses ``seed + i``.

        Args:
            seed, fields: of :class:`robuq_core.params.ImageParams`, such as ``steps`` or ``guidance_scale``; what is
                None takes the checkpoint's default. ``num_images`` is per class.
            on_step: is called after each step, for a progress bar. How long it took is in :attr:`timings`.

        Raises:
            ValueError: an unknown field or a value out of range, a name that is no class's, or a name that is not in
                a list.
        """
        if isinstance(class_ids, str):  # which is a sequence of its letters
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
        """What :func:`robuq_core.images.encode_image` stores in the image of ``spec``."""
        names = self.class_names
        name = names[spec.class_id] if spec.class_id < len(names) else ""
        return image_settings(spec, self.checkpoint_name, name if self.num_classes else None)

    def class_id(self, class_id: int | str | None) -> int:
        """The id of a class by its name, or by itself; None, of a network without classes, is 0.

        Raises:
            ValueError: a name that no class has, or several have; None where there are classes.
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
        """Wait until the device has done what it was given, so that what is timed has happened."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _decoder_for(path: Path, decoder: Path | str | Decoder | None, device: torch.device) -> Decoder | None:
    """What the checkpoint at ``path`` decodes with, on ``device``; None where it draws pixels."""
    if read_header(path).decoder == "pixels":
        return None
    if decoder is None:
        beside = path.parent / DECODER_FOLDER
        if not beside.is_dir():
            raise CheckpointError(f"{path}: {NO_DECODER}")
        decoder = beside
    return load_decoder(decoder, device=device) if isinstance(decoder, (str, Path)) else decoder.replica(device)
