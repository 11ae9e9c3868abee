"""Images in progress: the settings of each, its state, and the tensors of rows that are stepped together.

Step caching: after the last block the tokens are ``e(x_t) + delta_t``, the embedded input plus the sum of all blocks.
``delta_t`` changes slowly with the timestep (arXiv 2406.01125, 2407.01425), so a row may use ``e(x_t) + delta_s`` of an
earlier step, ``s > t``, and go straight to the final layer, which still sees ``x_t`` and ``t``. The last step always
runs the blocks, since no later step would correct it. Each row keeps its own delta, so no image depends on others.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from robuq_core.config import PredictionType
from robuq_core.diffusion.samplers import StepTable, step_coefficients, step_table
from robuq_core.diffusion.update import RowStep
from robuq_core.models.packed_dit import PackedDiT
from robuq_core.params import ALL_TIMESTEPS, RowSpec
from robuq_core.staging import taken


class Batch(NamedTuple):
    """Rows that went through a step together: ``x_t`` and the latest estimates ``x_0``, float32 ``[B, C, H, W]``,
    read-only."""

    x: Tensor
    previous_x0: Tensor


class Row:
    """An image in progress: row ``index`` of ``batch``, the tensors of the rows that it was last stepped with.

    Args:
        noise: ``[C, H, W]``, to start from instead of the noise of the seed.
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
        # Always the CPU's generator: the noise of a seed does not depend on the device.
        self._generator = torch.Generator().manual_seed(spec.seed)
        self._noise: Tensor | None = None
        own = torch.randn(shape, generator=self._generator)  # generated even if unused, since later noise follows it
        x = own if noise is None else noise.reshape(shape)
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
        """The next step uses :attr:`block_delta` instead of running the blocks."""
        kept = self.block_delta
        # If guidance starts between two steps that run the blocks, the unconditional delta does not exist yet.
        return kept is not None and self._may_reuse(self.steps_done) and len(kept) > self.guided

    @property
    def keeps_blocks(self) -> bool:
        """The step after the next one may reuse the next one's block delta."""
        return self._may_reuse(self.steps_done + 1)

    def _may_reuse(self, step: int) -> bool:
        steps_after = len(self.table) - step - 1
        return steps_after >= 0 and steps_after % self.spec.cache_interval > 0

    @property
    def block_rows(self) -> int:
        """Rows of the model that go through the blocks in the next step."""
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
        """A copy in the same state, whose next step adds the same noise."""
        if self.needs_noise:
            self.noise()
        return copy.copy(self)

    def advance(self, batch: Batch, index: int, block_delta: Tensor | None = None) -> None:
        """Store the result of a step, and its block delta if it is to be kept."""
        self.batch, self.index, self._noise = batch, index, None
        if block_delta is not None:
            self.block_delta = block_delta
        self.steps_done += 1
        if self.done:
            self.block_delta = None


def together(rows: Sequence[Row]) -> Batch:
    """The tensors of ``rows``; reuses those of the latest step if it had the same rows in the same order."""
    batch = rows[0].batch
    if len(batch.x) == len(rows) and all(row.batch is batch and row.index == i for i, row in enumerate(rows)):
        return batch
    return Batch(torch.stack([row.x for row in rows]), torch.stack([row.previous_x0 for row in rows]))


class Inputs(NamedTuple):
    """Of a forward: ``x [M, C, H, W]``, M timesteps and M classes."""

    x: Tensor
    timesteps: Sequence[float]
    classes: Sequence[int]

    def at(self, indices: list[int]) -> Inputs:
        return Inputs(taken(self.x, indices), [self.timesteps[i] for i in indices], [self.classes[i] for i in indices])


def cached_forward(
    model: PackedDiT, rows: Sequence[Row], owners: Sequence[int], inputs: Inputs
) -> tuple[Tensor, dict[int, Tensor]]:
    """The network's output for M ``inputs``, and the deltas to keep, ``[1 or 2, L, D]`` by position in ``rows``.

    Args:
        owners: for each of the M inputs its position in ``rows``: all rows in order with their class, then the guided
            ones again without.
    """
    reusing = [i for i, owner in enumerate(owners) if rows[owner].reuses_blocks]
    running = [i for i, owner in enumerate(owners) if not rows[owner].reuses_blocks]
    if not reusing:
        return _run(model, rows, owners, inputs)
    kept = torch.stack([_delta(rows[owners[i]], without_class=i >= len(rows)) for i in reusing])
    reused = model.forward_reusing(*inputs.at(reusing), kept)
    if not running:
        return reused, {}
    ran, deltas = _run(model, rows, [owners[i] for i in running], inputs.at(running))
    output = ran.new_empty(len(owners), *ran.shape[1:])
    output[reusing], output[running] = reused, ran
    return output, deltas


def _delta(row: Row, without_class: bool) -> Tensor:
    assert row.block_delta is not None
    return row.block_delta[int(without_class)]


def _run(
    model: PackedDiT, rows: Sequence[Row], owners: Sequence[int], inputs: Inputs
) -> tuple[Tensor, dict[int, Tensor]]:
    keep = [i for i, owner in enumerate(owners) if rows[owner].keeps_blocks]
    if not keep:
        return model.forward(*inputs), {}
    output, deltas = model.forward_keeping(*inputs, keep)
    positions: dict[int, list[int]] = {}
    for position, i in enumerate(keep):
        positions.setdefault(owners[i], []).append(position)
    # Copies: views would keep the whole batch alive.
    return output, {owner: taken(deltas, at) for owner, at in positions.items()}
