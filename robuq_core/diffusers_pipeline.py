"""A packed checkpoint behind the interface of diffusers' ``DiTPipeline``, so that a script changes one line:

    from robuq_core import RobuQPipeline as DiTPipeline

The same generator gives the same initial noise. The steps are those of the official DiT code, so images resemble
those of a ``DiTPipeline`` with the same weights but are not identical.
"""

from __future__ import annotations

import importlib
import inspect
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from robuq_core.checkpoint import Header
from robuq_core.classes import synonyms_of
from robuq_core.config import BETA_END, BETA_START, MAX_SEED, SamplerName
from robuq_core.decode import LatentDecoder, is_at, to_pixels
from robuq_core.errors import UserError
from robuq_core.params import RowSpec
from robuq_core.pipeline import Sampler
from robuq_core.rows import Row

Generators = torch.Generator | list[torch.Generator] | None

# DDIM's eta is 0 in diffusers too.
_SAMPLERS: dict[str, SamplerName] = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "DPMSolverMultistepScheduler": "dpmsolver++",
}
# Settings of schedulers that may differ: the timesteps are this project's, and its last step is first order anyway.
_FREE_SETTINGS = {"timestep_spacing", "steps_offset", "lambda_min_clipped", "euler_at_final", "lower_order_final"}


class PipelineOutput(NamedTuple):
    """``images``: a list of PIL images, or an array or tensor of the batch."""

    images: list[Image.Image] | np.ndarray | Tensor


def _scheduler(name: str, header: Header) -> Any:
    """The diffusers scheduler ``name`` for the process of the checkpoint.

    Raises:
        UserError: diffusers is not installed.
    """
    try:
        library = importlib.import_module("diffusers")
    except ImportError as error:
        raise UserError("a scheduler is an object of diffusers; from a checkout: pip install '.[vae]'") from error
    diffusion = header.diffusion
    # A foreign _class_name keeps clip_sample in the configuration of classes that do not clip, for conversions.
    config = {"beta_start": BETA_START, "beta_end": BETA_END, "prediction_type": diffusion.prediction_type,
              "clip_sample": diffusion.clip_sample, "variance_type": "fixed_large",
              "_class_name": "DDIMScheduler"}  # fmt: skip
    return getattr(library, name).from_config(config)


def _sampler_of(scheduler: Any, header: Header) -> SamplerName:
    """The sampler equivalent to ``scheduler``, whose settings must be those of :func:`_scheduler`."""
    if header.diffusion.prediction_type == "flow":
        raise ValueError("scheduler: DiTPipeline's schedulers do not support a flow; do not set one")
    name = type(scheduler).__name__
    if name not in _SAMPLERS:
        raise ValueError(f"scheduler {name} is not supported; set one of {', '.join(_SAMPLERS)}")
    free = set(_FREE_SETTINGS)
    if header.model.learn_sigma or _SAMPLERS[name] != "ddpm":  # a learned variance is always used
        free.add("variance_type")
    config, expected = scheduler.config, _scheduler(name, header).config
    # Only the class's own settings: others may be left over from a conversion.
    for key in inspect.signature(type(scheduler).__init__).parameters.keys() & config.keys() - free:
        if str(config[key]) != str(expected[key]):
            found = reprlib.repr(config[key])
            raise ValueError(f"{name}: {key} {found} is not supported; set {expected[key]!r}")
    return _SAMPLERS[name]


class RobuQPipeline:
    """Generates images with :attr:`sampler`, a :class:`robuq_core.pipeline.Sampler`.

    ``labels``: class id by name, for every synonym of every class, sorted.
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
        use_safetensors: bool | None = None,
        variant: str | None = None,
    ) -> RobuQPipeline:
        """Load a packed checkpoint: a file, a folder or a hub id; ``None``: the bundled one.

        Args:
            decoder, backend, threads: as for :meth:`robuq_core.pipeline.Sampler.from_checkpoint`.
            torch_dtype, use_safetensors, variant: ignored; a packed checkpoint is one safetensors file with number
                formats of its own, and decoding is in float32.

        Raises:
            CheckpointError, DecoderError: it cannot be loaded, or a latent model has no decoder.
            ValueError: unknown backend.
        """
        path = pretrained_model_name_or_path
        return cls(Sampler.from_checkpoint(path, decoder=decoder, backend=backend, threads=threads))

    @property
    def device(self) -> torch.device:
        return self.sampler.device

    @property
    def vae(self) -> Any:
        """diffusers' autoencoder without its encoder; None for a pixel model."""
        decoder = self.sampler.decoder
        return decoder.autoencoder if isinstance(decoder, LatentDecoder) else None

    def to(self, *args: torch.device | torch.dtype | str, device: torch.device | str | None = None) -> RobuQPipeline:
        """Move to a device; returns itself. A dtype is ignored.

        Raises:
            ValueError: no backend runs there, or the network is not packed.
        """
        for value in args:
            device = device if isinstance(value, torch.dtype) else value
        if device is not None and not is_at(self.device, torch.device(device)):
            sampler = self.sampler
            if sampler.path is None:
                raise ValueError(f"{sampler.checkpoint_name}: only a sampler of a packed file can move to {device}")
            backend = "reference" if sampler.backend_name == "reference" else "auto"
            self.sampler = Sampler.from_checkpoint(
                sampler.path, decoder=sampler.decoder, backend=backend, device=device
            )
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
            UserError: diffusers is not installed, or it has no such scheduler. ValueError: an unsupported one was set.
        """
        if self._scheduler is None:
            name = next((name for name, sampler in _SAMPLERS.items() if sampler == self._sampler_name), None)
            if name is None:
                raise UserError(f"scheduler: DiTPipeline has none for {self._sampler_name}; use Sampler")
            self._scheduler = _scheduler(name, self.sampler.header)
        return self._scheduler

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        self._sampler_name = _sampler_of(scheduler, self.sampler.header)
        self._scheduler = scheduler

    def enable_attention_slicing(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: attention is fused, and a packed network is small enough to stay on its device."""

    enable_model_cpu_offload = enable_xformers_memory_efficient_attention = enable_attention_slicing

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """Settings of the progress bar, as :class:`tqdm.tqdm` takes them: ``disable``, ``desc``, ``leave`` ..."""
        self._bar = kwargs

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
            :class:`PipelineOutput`; with ``return_dict=False`` a tuple of the images.

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
            for _ in tqdm(range(num_inference_steps), **self._bar):
                self.sampler.step(rows)
            images = self._decoded(rows, output_type)
        return PipelineOutput(images) if return_dict else (images,)

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
