"""A request in the engine's terms: every default filled in, every name resolved against one model."""

from __future__ import annotations

import random
from dataclasses import dataclass

from robuq_core.config import MAX_SEED, SamplerName, image_seed, samplers_of
from server.api.catalog import Model
from server.api.errors import invalid
from server.engine import ImageFormat
from server.engine.model import ALL_TIMESTEPS, RowSpec


@dataclass(slots=True)
class Order:
    """What the engine is asked for, and what an answer tells of it."""

    model: str
    class_id: int | None  # None where the model has no classes
    class_name: str
    seed: int
    specs: tuple[RowSpec, ...]
    image_format: ImageFormat
    size: str
    timeout_s: float
    priority: int = 0
    preview_every: int = 0
    watched: bool = False  # somebody wants its events


def make_order(
    model: Model,
    class_id: int,
    *,
    num_images: int,
    image_format: ImageFormat,
    timeout_s: float,
    seed: int | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    guidance_interval: tuple[int, int] = ALL_TIMESTEPS,
    cache_interval: int = 1,
    sampler: SamplerName | None = None,
    priority: int = 0,
) -> Order:
    """An order of ``num_images`` of one class; what is ``None`` takes the model's default, the seed a random one.

    Raises:
        ApiError: 422 for a sampler or a guidance that the model cannot be drawn with.
    """
    defaults = model.defaults
    if seed is None:
        seed = random.randint(0, MAX_SEED)
    steps = steps or defaults.steps
    guidance_scale = defaults.guidance_scale if guidance_scale is None else guidance_scale
    sampler = sampler or defaults.sampler
    check_choices(model, sampler, guidance_scale)
    specs = tuple(
        RowSpec(class_id, image_seed(seed, i), steps, guidance_scale, sampler, guidance_interval, cache_interval)
        for i in range(num_images)
    )
    return Order(
        model.name,
        class_id if model.num_classes else None,
        model.classes.name(class_id),
        seed,
        specs,
        image_format,
        model.size,
        timeout_s,
        priority,
    )


def check_choices(model: Model, sampler: SamplerName, guidance_scale: float) -> None:
    """Refuse with 422 what ``model`` cannot be drawn with, by the name of the field."""
    allowed = samplers_of(model.prediction_type)
    if sampler not in allowed:
        raise invalid("sampler", f"sampler must be one of {', '.join(allowed)} with this model")
    if guidance_scale != 1 and not model.can_guide:
        raise invalid("guidance_scale", "guidance_scale must be 1 with this model, which has nothing to guide by")
