"""The images under way: what one is to be, how far it has come, and the tensor of those that go on together."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from robuq_core.config import PredictionType
from robuq_core.diffusion.samplers import StepTable, step_coefficients, step_table
from robuq_core.diffusion.update import RowStep
from robuq_core.params import ALL_TIMESTEPS, RowSpec


class Batch(NamedTuple):
    """Rows that went through a step together: ``x_t`` and the latest estimates ``x_0``, float32 ``[B, C, H, W]``. Not
    to be written to."""

    x: Tensor
    previous_x0: Tensor


class Row:
    """An image on its way from noise: row ``index`` of ``batch``, the tensors of the rows that it was stepped with.

    Args:
        noise: ``[C, H, W]``, to start from instead of what the seed draws.
    """

    def __init__(
        self,
        spec: RowSpec,
        shape: tuple[int, int, int],
        prediction_type: PredictionType,
        device: torch.device,
        noise: Tensor | None = None,
    ) -> None:
        self.spec = spec
        self.table: StepTable = step_table(spec.sampler, spec.steps)
        self.coefficients = step_coefficients(spec.sampler, spec.steps, prediction_type)
        # Always the CPU's generator: what a seed draws does not depend on the device.
        self._generator = torch.Generator().manual_seed(spec.seed)
        self._noise: Tensor | None = None
        drawn = torch.randn(shape, generator=self._generator)  # also where it is not used: later noise comes after it
        x = drawn if noise is None else noise.reshape(shape)
        self.batch = Batch(x.to(device, torch.float32)[None], torch.zeros(1, *shape, device=device))
        self.index = 0
        self.block_delta: Tensor | None = None  # what the blocks added at the latest step that kept it, [1 or 2, L, D]
        self.steps_done = 0

    @property
    def x(self) -> Tensor:
        """``x_t``, float32 ``[C, H, W]``."""
        return self.batch.x[self.index]

    @property
    def previous_x0(self) -> Tensor:
        """The latest estimate of ``x_0``, float32 ``[C, H, W]``."""
        return self.batch.previous_x0[self.index]

    @property
    def done(self) -> bool:
        return self.steps_done == len(self.table)

    @property
    def timestep(self) -> float:
        """What the network sees at the next step: an original index 0..999 or, of a flow, 1000 s."""
        return self.table.timesteps[self.steps_done]

    @property
    def guided(self) -> bool:
        """The next step needs the unconditional output too."""
        low, high = self.spec.guidance_interval
        # A flow starts at 1000, above the highest index.
        return self.spec.guidance_scale != 1 and low <= min(self.timestep, ALL_TIMESTEPS[1]) <= high

    @property
    def reuses_blocks(self) -> bool:
        """The next step takes :attr:`block_delta` instead of running the blocks."""
        kept = self.block_delta
        # Guidance that sets in between two steps that run the blocks needs what none of them kept.
        return kept is not None and self._may_reuse(self.steps_done) and len(kept) > self.guided

    @property
    def keeps_blocks(self) -> bool:
        """The step after the next one may take what the blocks add at the next."""
        return self._may_reuse(self.steps_done + 1)

    def _may_reuse(self, step: int) -> bool:
        steps_after = len(self.table) - step - 1
        return steps_after >= 0 and steps_after % self.spec.cache_interval > 0

    @property
    def block_rows(self) -> int:
        """Rows of the model that the next step takes through the blocks."""
        return 0 if self.reuses_blocks else 1 + self.guided

    @property
    def needs_noise(self) -> bool:
        return self.table.stochastic and self.steps_done < len(self.table) - 1

    def noise(self) -> Tensor:
        """The next step's noise, on the CPU; the same until the row advances, so a step that failed can be repeated."""
        if self._noise is None:
            self._noise = torch.randn(self.batch.x.shape[1:], generator=self._generator)
        return self._noise

    def next_step(self, with_noise: bool) -> RowStep:
        """What the update of the next step needs to know; its noise only ``with_noise``."""
        return RowStep(
            self.coefficients[self.steps_done],
            self.spec.guidance_scale if self.guided else None,
            self.table.multistep,
            self.noise() if with_noise and self.needs_noise else None,
        )

    def twin(self) -> Row:
        """A row in the same state whose next step draws the same noise."""
        if self.needs_noise:
            self.noise()
        return copy.copy(self)

    def advance(self, batch: Batch, index: int, block_delta: Tensor | None = None) -> None:
        """Take over the result of a step, and what its blocks added if that is to be kept."""
        self.batch, self.index, self._noise = batch, index, None
        if block_delta is not None:
            self.block_delta = block_delta
        self.steps_done += 1
        if self.done:
            self.block_delta = None


def together(rows: Sequence[Row]) -> Batch:
    """The tensors of ``rows``, one or more: those of the latest step where it had the same rows in the same order."""
    batch = rows[0].batch
    if len(batch.x) == len(rows) and all(row.batch is batch and row.index == i for i, row in enumerate(rows)):
        return batch
    return Batch(torch.stack([row.x for row in rows]), torch.stack([row.previous_x0 for row in rows]))
