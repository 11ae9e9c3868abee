"""An engine as the settings ask for."""

from __future__ import annotations

from collections.abc import Sequence

from server.engine.engine import Engine
from server.engine.model import StepSampler
from server.metrics import Metrics
from server.scheduler import Scheduler
from server.settings import Settings


def create_engine(samplers: Sequence[StepSampler], settings: Settings, *, scheduler: Scheduler | None = None) -> Engine:
    """An engine with one replica a sampler, not yet started; ``scheduler`` replaces the continuous one."""
    return Engine(
        samplers,
        Metrics(settings.max_batch_rows),
        max_batch_rows=settings.max_batch_rows,
        max_queue_images=settings.max_queue_images,
        decode_threads=settings.decode_threads,
        stall_timeout_s=settings.stall_timeout_s,
        target_step_s=settings.target_step_s,
        priority_ageing_s=settings.priority_ageing_s,
        scheduler=scheduler,
    )
