"""A packed checkpoint behind the interface of diffusers' ``DiTPipeline``, so that a script changes one line:

    from robuq_core import RobuQPipeline as DiTPipeline

The same generator gives the same initial noise. The steps are those of the official DiT code, so images resemble
those of a ``DiTPipeline`` with the same weights but are not identical.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from robuq_core.classes import synonyms_of
from robuq_core.config import MAX_SEED
from robuq_core.decode import LatentDecoder, is_at, to_pixels
from robuq_core.diffusers_schedulers import sampler_of, scheduler_of
from robuq_core.hub import resolve_checkpoint
from robuq_core.pipeline import Row, RowSpec, Sampler

Generators = torch.Generator | list[torch.Generator] | None


@dataclass
class PipelineOutput:
    """``images``: a list of PIL images, or an array or tensor of the batch. Replaces diffusers'
    ``ImagePipelineOutput`` if that library is not installed."""

    images: list[Image.Image] | np.ndarray | Tensor


class RobuQPipeline:
    """Generates images with :attr:`sampler`, a :class:`robuq_core.pipeline.Sampler`.

    Attributes:
        labels: class id by name, for every synonym of every class, sorted.
    """

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        names = enumerate(sampler.class_names)
        self.labels = dict(sorted((label, class_id) for class_id, name in names for label in synonyms_of(name)))
        self._sampler_name = sampler.defaults.sampler
        self._scheduler: Any = None
        self._bar: dict[str, Any] = {}

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Path | str | None = None,
        *,
        decoder: Path | str | None = None,
        torch_dtype: torch.dtype | None = None,
        backend: str = "auto",
        threads: int | None = None,
        revision: str | None = None,
        cache_dir: Path | str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        use_safetensors: bool | None = None,
        variant: str | None = None,
    ) -> RobuQPipeline:
        """Load a packed checkpoint: a file, a folder or a hub id; ``None``: the bundled one.

        Args:
            decoder, backend, threads: as for :meth:`robuq_core.pipeline.Sampler.from_checkpoint`.
            torch_dtype: of the decoder; a packed network has its own number formats.
            revision, cache_dir, token, local_files_only: of a hub id.
            use_safetensors, variant: ignored; a packed checkpoint is one safetensors file.

        Raises:
            CheckpointError, DecoderError: it cannot be loaded, or a latent model has no decoder.
            ValueError: unknown backend.
        """
        hub = {"revision": revision, "cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
        path = resolve_checkpoint(pretrained_model_name_or_path, **hub)  # type: ignore[arg-type]
        pipeline = cls(Sampler.from_checkpoint(path, decoder=decoder, backend=backend, threads=threads))
        return pipeline if torch_dtype is None else pipeline.to(torch_dtype)

    @property
    def device(self) -> torch.device:
        return self.sampler.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the decoder; the network computes in float32."""
        decoder = self.sampler.decoder
        return decoder.dtype if isinstance(decoder, LatentDecoder) else torch.float32

    @property
    def vae(self) -> Any:
        """diffusers' autoencoder without its encoder; None for a pixel model."""
        decoder = self.sampler.decoder
        return decoder.autoencoder if isinstance(decoder, LatentDecoder) else None

    def to(
        self,
        *args: torch.device | torch.dtype | str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> RobuQPipeline:
        """Move to a device, change the decoder's floating type, or both; returns itself.

        Raises:
            ValueError: neither is given, or the backend does not run there.
        """
        for value in args:
            if isinstance(value, torch.dtype):
                dtype = value
            else:
                device = value
        if device is None and dtype is None:
            raise ValueError("to() needs a device, a dtype or both")
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"to() takes a floating dtype, not {dtype}")
        if device is not None and not is_at(self.device, torch.device(device)):
            self.sampler = self.sampler.replica(device=device)
        if dtype is not None and isinstance(self.sampler.decoder, LatentDecoder):
            self.sampler.decoder = self.sampler.decoder.cast(dtype)
        return self

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        """Class ids of names in :attr:`labels`; a single name gives a list of one.

        Raises:
            ValueError: unknown name.
        """
        names = [label] if isinstance(label, str) else list(label)
        for name in names:
            if name not in self.labels:
                raise ValueError(f"{name!r} is no label of this checkpoint; .labels lists all {len(self.labels)}")
        return [self.labels[name] for name in names]

    @property
    def scheduler(self) -> Any:
        """The diffusers scheduler equivalent to the sampler in use. Set a DDIMScheduler, DDPMScheduler or
        DPMSolverMultistepScheduler to choose the sampler; the timesteps stay this project's.

        Raises:
            UserError: diffusers is not installed. ValueError: an unsupported scheduler was set.
        """
        if self._scheduler is None:
            self._scheduler = scheduler_of(self._sampler_name, self.sampler.header)
        return self._scheduler

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        self._sampler_name = sampler_of(scheduler, self.sampler.header)
        self._scheduler = scheduler

    @property
    def components(self) -> dict[str, Any]:
        """``transformer``, ``vae`` and ``scheduler``, by name.

        Raises:
            UserError: diffusers is not installed.
        """
        return {"transformer": self.sampler.model, "vae": self.vae, "scheduler": self.scheduler}

    def enable_attention_slicing(self, slice_size: str | int | None = "auto") -> None:
        """Does nothing: attention is fused and needs no slicing."""

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str | None = None) -> None:
        """Does nothing: a packed network is small enough to stay on its device."""

    def enable_xformers_memory_efficient_attention(self, attention_op: Any = None) -> None:
        """Does nothing."""

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """Settings of the progress bar, as :class:`tqdm.tqdm` takes them: ``disable``, ``desc``, ``leave`` ..."""
        self._bar = kwargs

    def progress_bar(self, iterable: Iterable[Any] | None = None, total: int | None = None) -> Any:
        """A :class:`tqdm.tqdm` over ``iterable`` or ``range(total)``.

        Raises:
            ValueError: neither is given.
        """
        if iterable is None and total is None:
            raise ValueError("progress_bar needs an iterable or a total")
        return tqdm(range(total or 0) if iterable is None else iterable, **self._bar)

    def __call__(
        self,
        class_labels: list[int],
        guidance_scale: float = 4.0,
        generator: Generators = None,
        num_inference_steps: int = 50,
        output_type: str | None = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Generate one image per label, as one batch.

        Args:
            guidance_scale: guides above 1; the default counts as 1 for a network that cannot be guided.
            generator: of the initial noise, as in diffusers: one for the batch, or a list with one per image.
            output_type: ``pil`` images, ``np`` float32 ``[B, H, W, 3]`` or ``pt`` ``[B, 3, H, W]``, both 0 to 1;
                ``None`` is ``np``.

        Returns:
            diffusers' ``ImagePipelineOutput`` if that library is installed, else :class:`PipelineOutput`; with
            ``return_dict=False`` a tuple of the images.

        Raises:
            ValueError: a label, the number of steps, the output type or the number of generators is wrong.
        """
        output_type = "np" if output_type is None else output_type
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type {output_type!r} is not supported; choose pil, np or pt")
        if not len(class_labels):
            raise ValueError("class_labels is empty; give one class id per image")
        with torch.inference_mode():
            scale = guidance_scale if self.sampler.can_guide or guidance_scale != 4.0 else 1.0
            rows = self._start([int(label) for label in class_labels], scale, generator, num_inference_steps)
            for _ in self.progress_bar(total=num_inference_steps):
                self.sampler.step(rows)
            images = self._decoded(rows, output_type)
        return _output(images) if return_dict else (images,)

    def _start(self, labels: Sequence[int], scale: float, generator: Generators, steps: int) -> list[Row]:
        model = self.sampler.header.model
        generators = generator if isinstance(generator, list) else [generator]
        if len(generators) not in (1, len(labels)):
            raise ValueError(f"{len(generators)} generators for {len(labels)} class labels; give one, or one per label")
        # One generator makes the noise of the whole batch; a list has one per image.
        shape = (len(labels) // len(generators), model.in_channels, model.input_size, model.input_size)
        noise = torch.cat([torch.randn(shape, generator=each, device=self._place(each)) for each in generators])
        # Seeds of the noise between the steps, which only DDPM adds.
        seeds = [int(torch.randint(MAX_SEED + 1, (), generator=each, device=self._place(each, "cpu")))
                 for each in generators * shape[0]]  # fmt: skip
        return [
            self.sampler.start(RowSpec(label, seed, steps, scale if scale > 1 else 1.0, self._sampler_name), x)
            for label, seed, x in zip(labels, seeds, noise, strict=True)
        ]

    def _place(self, generator: torch.Generator | None, default: str | None = None) -> torch.device | str:
        return generator.device if generator is not None else default or self.device

    def _decoded(self, rows: Sequence[Row], output_type: str) -> list[Image.Image] | np.ndarray | Tensor:
        images = [self.sampler.decode_float(row.x) for row in rows]
        if output_type == "pil":
            return [Image.fromarray(to_pixels(image)) for image in images]
        # Callers cannot compute gradients through a tensor made in inference mode.
        with torch.inference_mode(False):
            batch = torch.stack([(image.clone() / 2 + 0.5).clamp(0, 1) for image in images])
        return batch if output_type == "pt" else batch.permute(0, 2, 3, 1).cpu().numpy()


def _output(images: Any) -> Any:
    if importlib.util.find_spec("diffusers") is None:
        return PipelineOutput(images)
    library: Any = importlib.import_module("diffusers.pipelines.pipeline_utils")
    return library.ImagePipelineOutput(images=images)
