"""A packed checkpoint behind the calls of diffusers' ``DiTPipeline``, so that a script changes one line:

    from robuq_core import RobuQPipeline as DiTPipeline

The same generator gives the same initial noise as there. Steps are this project's (those of the official DiT code), so
pictures resemble those of a ``DiTPipeline`` with the same weights, and are not the same.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from robuq_core.classes import synonyms_of
from robuq_core.config import MAX_SEED
from robuq_core.decode import LatentDecoder, to_pixels
from robuq_core.diffusers_schedulers import sampler_of, scheduler_of
from robuq_core.hub import resolve_checkpoint
from robuq_core.pipeline import Row, RowSpec, Sampler
from robuq_core.progress_bar import ProgressBar

OutputType = Literal["pil", "np", "pt"]
Generators = torch.Generator | list[torch.Generator] | None

_BAR_SETTINGS = ("disable", "desc", "leave")

Item = TypeVar("Item")


@dataclass
class PipelineOutput:
    """``images``: a list of PIL images, or an array or tensor of the batch. Stands in for diffusers'
    ``ImagePipelineOutput`` where that library is not installed."""

    images: list[Image.Image] | np.ndarray | Tensor


class RobuQPipeline:
    """Draws with a :class:`robuq_core.pipeline.Sampler`, which is its :attr:`sampler`.

    Attributes:
        labels: every synonym of every class name, sorted, to its class id.
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
        """Load a packed checkpoint: a file, a folder, an id of the hub; ``None`` is the bundled one.

        Args:
            decoder: of a latent model, as :meth:`robuq_core.pipeline.Sampler.from_checkpoint` takes it.
            torch_dtype: of the decoder; a packed network has number formats of its own.
            backend, threads: as :func:`robuq_core.kernels.backends.select_backend` takes them.
            revision, cache_dir, token, local_files_only: of a hub id.
            use_safetensors, variant: ignored; a packed checkpoint is one safetensors file.

        Raises:
            CheckpointError, DecoderError: what to load cannot be used, or a latent model has no decoder.
            ValueError: unknown backend.
        """
        path = resolve_checkpoint(
            pretrained_model_name_or_path,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
        )
        pipeline = cls(Sampler.from_checkpoint(path, decoder=decoder, backend=backend, threads=threads))
        return pipeline if torch_dtype is None else pipeline.to(torch_dtype)

    # What a DiTPipeline has.

    @property
    def device(self) -> torch.device:
        return self.sampler.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the decoder; the network's rows are float32."""
        decoder = self.sampler.decoder
        return decoder.dtype if isinstance(decoder, LatentDecoder) else torch.float32

    @property
    def vae(self) -> Any:
        """diffusers' autoencoder, without its encoder; None where the network draws pixels."""
        decoder = self.sampler.decoder
        return decoder.autoencoder if isinstance(decoder, LatentDecoder) else None

    def to(self, *args: torch.device | torch.dtype | str, **kwargs: Any) -> RobuQPipeline:
        """Move to a device, or have the decoder compute in another floating type, or both; returns itself.

        Raises:
            ValueError: neither of the two, or the backend does not run there. TypeError: another keyword.
        """
        device, dtype = _destination(args, kwargs)
        if device is not None and not _is_at(self.device, device):
            self.sampler = self.sampler.replica(device=device)
        if dtype is not None and isinstance(self.sampler.decoder, LatentDecoder):
            self.sampler.decoder = self.sampler.decoder.cast(dtype)
        return self

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        """Class ids of names as they stand in :attr:`labels`; one name gives a list of one.

        Raises:
            ValueError: a name that is none of the labels.
        """
        names = [label] if isinstance(label, str) else list(label)
        for name in names:
            if name not in self.labels:
                raise ValueError(f"{name!r} is no label of this checkpoint; .labels lists all {len(self.labels)}")
        return [self.labels[name] for name in names]

    @property
    def scheduler(self) -> Any:
        """diffusers' scheduler that stands for the sampler in use. Setting one of DDIMScheduler, DDPMScheduler and
        DPMSolverMultistepScheduler chooses the sampler; the timesteps stay this project's.

        Raises:
            UserError: diffusers is not installed. ValueError: one set is none of those, or of another process.
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

    # A packed network is small, and its attention never holds more than it needs.

    def enable_attention_slicing(self, slice_size: str | int | None = "auto") -> None:
        """Does nothing."""

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str | None = None) -> None:
        """Does nothing: the pipeline stays where it is."""

    def enable_xformers_memory_efficient_attention(self, attention_op: Any = None) -> None:
        """Does nothing."""

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """``disable``, ``desc`` and ``leave`` of the bar that a call draws.

        Raises:
            ValueError: another setting.
        """
        for name in kwargs:
            if name not in _BAR_SETTINGS:
                raise ValueError(f"progress bar setting {name!r} is not supported; set {', '.join(_BAR_SETTINGS)}")
        self._bar = kwargs

    def progress_bar(self, iterable: Iterable[Item] | None = None, total: int | None = None) -> ProgressBar[Item | int]:
        """A bar on standard error: loop over it for what ``iterable`` or ``range(total)`` yields, or enter it and call
        its ``update(n)``.

        Raises:
            ValueError: neither is given.
        """
        if iterable is None and total is None:
            raise ValueError("progress_bar needs an iterable or a total")
        items: Iterable[Item | int] = range(total or 0) if iterable is None else iterable
        return ProgressBar(items, total, **self._bar)

    def __call__(
        self,
        class_labels: list[int],
        guidance_scale: float = 4.0,
        generator: Generators = None,
        num_inference_steps: int = 50,
        output_type: str | None = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Draw one image a label, all of them together.

        Args:
            guidance_scale: guides above 1; the default counts as 1 for a network that cannot be guided.
            generator: draws the initial noise as diffusers does: one for the batch, or a list of one an image.
            output_type: ``pil`` images, ``np`` float32 ``[B, H, W, 3]`` or ``pt`` ``[B, 3, H, W]``, both 0 to 1;
                ``None`` is ``np``.

        Returns:
            diffusers' ``ImagePipelineOutput`` where that library is installed, else :class:`PipelineOutput`; with
            ``return_dict=False`` a tuple of the images alone.

        Raises:
            ValueError: a label or the number of steps is out of range, another output type, or as many generators as
                there are no labels.
        """
        output_type = "np" if output_type is None else output_type
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type {output_type!r} is not supported; choose pil, np or pt")
        if not len(class_labels):
            raise ValueError("class_labels is empty; give one class id an image")
        with torch.inference_mode():
            scale = guidance_scale if self.sampler.can_guide or guidance_scale != 4.0 else 1.0
            rows = self._start([int(label) for label in class_labels], scale, generator, num_inference_steps)
            for _ in self.progress_bar(total=num_inference_steps):
                self.sampler.step(rows)
            images = self._decoded(rows, output_type)
        return _output(images) if return_dict else (images,)

    def _start(self, labels: Sequence[int], scale: float, generator: Generators, steps: int) -> list[Row]:
        model = self.sampler.header.model
        shape = (len(labels), model.in_channels, model.input_size, model.input_size)
        noise = _initial_noise(shape, generator, self.device)
        seeds = _later_seeds(len(labels), generator)
        return [
            self.sampler.start(RowSpec(label, seed, steps, scale if scale > 1 else 1.0, self._sampler_name), x)
            for label, seed, x in zip(labels, seeds, noise, strict=True)
        ]

    def _decoded(self, rows: Sequence[Row], output_type: str) -> list[Image.Image] | np.ndarray | Tensor:
        pictures = [self.sampler.decode_float(row.x) for row in rows]
        if output_type == "pil":
            return [Image.fromarray(to_pixels(picture)) for picture in pictures]
        # A tensor of inference mode would not take part in a gradient of the caller's.
        with torch.inference_mode(False):
            batch = torch.stack([(picture.clone() / 2 + 0.5).clamp(0, 1) for picture in pictures])
        return batch if output_type == "pt" else batch.permute(0, 2, 3, 1).cpu().numpy()


def _destination(
    args: Sequence[torch.device | torch.dtype | str], kwargs: dict[str, Any]
) -> tuple[torch.device | None, torch.dtype | None]:
    unknown = set(kwargs) - {"device", "dtype", "torch_dtype", "torch_device", "silence_dtype_warnings"}
    if unknown:
        raise TypeError(f"to() does not take {sorted(unknown)[0]!r}; give device and dtype")
    device = kwargs.get("device", kwargs.get("torch_device"))
    dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
    for value in args:
        if isinstance(value, torch.dtype):
            dtype = value
        else:
            device = value
    if device is None and dtype is None:
        raise ValueError("to() needs a device, a dtype or both")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"to() takes a floating dtype, not {dtype}")
    return None if device is None else torch.device(device), dtype


def _is_at(present: torch.device, wanted: torch.device) -> bool:
    return present.type == wanted.type and (wanted.index is None or present.index == wanted.index)


def _initial_noise(shape: tuple[int, int, int, int], generator: Generators, device: torch.device) -> Tensor:
    """Standard normal, drawn as diffusers does: on the generator's device; of several, each draws its image."""
    if not isinstance(generator, list):
        place = device if generator is None else generator.device
        return torch.randn(shape, generator=generator, device=place)
    if len(generator) == 1:
        return _initial_noise(shape, generator[0], device)
    if len(generator) != shape[0]:
        raise ValueError(f"{len(generator)} generators for {shape[0]} class labels; give one, or one a label")
    return torch.cat([torch.randn((1, *shape[1:]), generator=one, device=one.device) for one in generator])


def _later_seeds(count: int, generator: Generators) -> list[int]:
    """Seeds of the noise between the steps, which DDPM alone has."""

    def draw(one: torch.Generator | None) -> int:
        place = "cpu" if one is None else one.device
        return int(torch.randint(MAX_SEED + 1, (), generator=one, device=place))

    if isinstance(generator, list):
        generators = generator * count if len(generator) == 1 else generator
        return [draw(one) for one in generators]
    return [draw(generator) for _ in range(count)]


def _output(images: Any) -> Any:
    if importlib.util.find_spec("diffusers") is None:
        return PipelineOutput(images)
    library: Any = importlib.import_module("diffusers.pipelines.pipeline_utils")
    return library.ImagePipelineOutput(images=images)
