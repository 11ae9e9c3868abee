"""What the engine asks of a model: one forward over rows that share nothing but the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from robuq_core.config import PredictionType, SamplerConfig
from robuq_core.decode import Decoder
from robuq_core.pipeline import ALL_TIMESTEPS, RowSpec

__all__ = ["ALL_TIMESTEPS", "Row", "RowSpec", "StepSampler", "rows_of"]


def rows_of(spec: RowSpec) -> int:
    """Most rows of the model that an image takes in a step: with guidance one more, without a class."""
    return 1 if spec.guidance_scale == 1 else 2


class Row(Protocol):
    """One image on its way through its steps."""

    @property
    def steps_done(self) -> int: ...

    @property
    def done(self) -> bool: ...

    @property
    def guided(self) -> bool:
        """The next step takes two rows of the model, one of them without a class."""

    @property
    def block_rows(self) -> int:
        """Rows of the model that the next step takes through its blocks: none where it reuses what they gave before."""


class StepSampler(Protocol):
    """The model side of the engine; ``robuq_core.pipeline.Sampler`` is one.

    ``start``, ``step`` and ``estimate`` are called from one thread at a time; ``decode`` and ``decode_estimate`` from
    several at once.
    """

    @property
    def defaults(self) -> SamplerConfig: ...
    @property
    def class_names(self) -> tuple[str, ...]: ...
    @property
    def num_classes(self) -> int: ...
    @property
    def drawn_classes(self) -> int:
        """How many ids a row may have: ``num_classes``, or one where there are no classes."""

    @property
    def prediction_type(self) -> PredictionType: ...
    @property
    def can_guide(self) -> bool:
        """Whether a guidance_scale other than 1 is possible."""

    @property
    def image_size(self) -> int: ...
    @property
    def checkpoint_name(self) -> str: ...
    @property
    def backend_name(self) -> str: ...
    @property
    def average_activation_bits(self) -> float: ...
    @property
    def weight_bytes(self) -> int:
        """Of the network, without the decoder."""

    @property
    def decoder(self) -> Decoder: ...

    forward_limit_s: float | None
    """Seconds after which ``step`` raises ``TooSlowError``, as far as the model can be interrupted."""

    def warm_up_rows(self, max_rows: int) -> tuple[int, ...]:
        """Sizes, in rows of the model, ascending, that a forward should have seen before the first request."""

    def start(self, spec: RowSpec) -> Any: ...

    def step(self, rows: Sequence[Any]) -> None:
        """One forward that advances every row by one step. A row's result must not depend on its neighbours."""

    def decode(self, row: Any) -> np.ndarray:
        """Pixels of a finished row, uint8 ``[H, W, 3]``."""

    def estimate(self, row: Any) -> Any:
        """A cheap snapshot of the picture that the model sees in a row at its latest step."""

    def decode_estimate(self, estimate: Any) -> np.ndarray:
        """Pixels of an estimate, uint8 ``[H, W, 3]``."""
