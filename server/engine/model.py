"""What the engine asks of a model: one forward over rows that share nothing but the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from robuq_core.config import SamplerConfig
from robuq_core.pipeline import RowSpec

__all__ = ["Row", "RowSpec", "StepSampler"]


class Row(Protocol):
    """One image on its way through its steps."""

    @property
    def steps_done(self) -> int: ...

    @property
    def done(self) -> bool: ...


class StepSampler(Protocol):
    """The model side of the engine; ``robuq_core.pipeline.Sampler`` is one.

    ``start`` and ``step`` are called from the engine's thread alone, ``decode`` from several at once.
    """

    @property
    def defaults(self) -> SamplerConfig: ...
    @property
    def class_names(self) -> tuple[str, ...]: ...
    @property
    def num_classes(self) -> int: ...
    @property
    def image_size(self) -> int: ...
    @property
    def checkpoint_name(self) -> str: ...
    @property
    def backend_name(self) -> str: ...
    @property
    def average_activation_bits(self) -> float: ...
    @property
    def weight_bytes(self) -> int: ...

    def start(self, spec: RowSpec) -> Any: ...

    def step(self, rows: Sequence[Any]) -> None:
        """One forward that advances every row by one step. A row's result must not depend on its neighbours."""

    def decode(self, row: Any) -> np.ndarray:
        """Pixels of a finished row, uint8 ``[H, W, 3]``."""
