"""A model that generates noise at once: for tests, and to measure the server without a model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from robuq_core.config import PredictionType, SamplerConfig
from robuq_core.images import image_settings
from robuq_core.params import RowSpec


@dataclass(eq=False)
class FakeRow:
    spec: RowSpec
    steps_done: int = 0

    @property
    def done(self) -> bool:
        return self.steps_done >= self.spec.steps

    @property
    def guided(self) -> bool:
        return self.spec.guidance_scale != 1

    @property
    def block_rows(self) -> int:
        return 1 + self.guided


class FakeSampler:
    """Pixels depend on the row's spec alone.

    Args:
        step_s: seconds that a step takes, whatever the rows.
        on_step: called with the rows before they advance; what it raises, ``step`` raises.
    """

    checkpoint_name = digest = "fake"
    backend_name = "fake"
    average_activation_bits = 2.0
    weight_bytes = 0
    prediction_type: PredictionType = "epsilon"
    decoder = SimpleNamespace(name="pixels", weight_bytes=0)
    path = None

    def __init__(
        self,
        step_s: float = 0.0,
        *,
        image_size: int = 32,
        class_names: tuple[str, ...] = ("tench", "goldfish", "great white shark", "crane", "crane"),
        on_step: Callable[[Sequence[FakeRow]], None] | None = None,
    ) -> None:
        self.step_s = step_s
        self.image_size = image_size
        self.class_names = class_names
        self.num_classes = len(class_names)
        self.valid_classes = max(1, self.num_classes)
        self.can_guide = self.num_classes > 0
        self.on_step = on_step
        self.defaults = SamplerConfig(sampler="ddim", steps=4, guidance_scale=1.5 if self.can_guide else 1.0)

    def warm_up_rows(self, max_rows: int) -> tuple[int, ...]:
        return tuple(sorted({1, max_rows}))

    def start(self, spec: RowSpec) -> FakeRow:
        return FakeRow(spec)

    def step(self, rows: Sequence[FakeRow]) -> None:
        if self.on_step is not None:
            self.on_step(rows)
        if self.step_s:
            time.sleep(self.step_s)
        for row in rows:
            row.steps_done += 1

    def estimate(self, row: FakeRow) -> tuple[RowSpec, int]:
        return row.spec, row.steps_done

    def settings_of(self, spec: RowSpec) -> dict[str, Any]:
        return image_settings(spec, self.checkpoint_name, self.class_names[spec.class_id] if self.class_names else None)

    def decode(self, row: FakeRow) -> np.ndarray:
        return self._noise(row.spec, row.spec.steps)

    def decode_estimate(self, estimate: tuple[RowSpec, int]) -> np.ndarray:
        return self._noise(*estimate)

    def _noise(self, spec: RowSpec, steps_done: int) -> np.ndarray:
        rng = np.random.default_rng([spec.class_id, spec.seed, steps_done, int(spec.guidance_scale * 1e6)])
        return rng.integers(0, 256, (self.image_size, self.image_size, 3), dtype=np.uint8)
