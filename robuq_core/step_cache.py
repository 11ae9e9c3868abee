"""Step caching: some steps reuse what the blocks of an earlier step added to the tokens.

After the last block the tokens are ``e(x_t) + delta_t``, the embedded input plus the sum of all blocks. ``delta_t``
changes slowly with the timestep (arXiv 2406.01125, 2407.01425), so a row may use ``e(x_t) + delta_s`` of an earlier
step, ``s > t``, and go straight to the final layer, which still sees ``x_t`` and ``t``. The last step always runs the
blocks, since no later step would correct it.

Each row keeps its own delta, float32 ``[L, D]``, and a second one with guidance, so that rows with and without reuse
share a step and no image depends on its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from robuq_core.models.packed_dit import PackedDiT
from robuq_core.rows import Row
from robuq_core.staging import taken


def cached_forward(
    model: PackedDiT, rows: Sequence[Row], owners: Sequence[int], x: Tensor, timesteps: Tensor, classes: Tensor
) -> tuple[Tensor, dict[int, Tensor]]:
    """The network's output for ``x [M, C, H, W]``, and the deltas to keep, ``[1 or 2, L, D]`` by position in ``rows``.

    Args:
        owners: for each of the M inputs its position in ``rows``: all rows in order with their class, then the guided
            ones again without.
    """
    reusing = [i for i, owner in enumerate(owners) if rows[owner].reuses_blocks]
    running = [i for i, owner in enumerate(owners) if not rows[owner].reuses_blocks]
    if not reusing:
        return _run(model, rows, owners, x, timesteps, classes)
    kept = torch.stack([_delta(rows[owners[i]], without_class=i >= len(rows)) for i in reusing])
    reused = model.forward_reusing(taken(x, reusing), timesteps[reusing], classes[reusing], kept)
    if not running:
        return reused, {}
    inputs = taken(x, running), timesteps[running], classes[running]
    ran, deltas = _run(model, rows, [owners[i] for i in running], *inputs)
    output = ran.new_empty(len(owners), *ran.shape[1:])
    output[reusing], output[running] = reused, ran
    return output, deltas


def _delta(row: Row, without_class: bool) -> Tensor:
    assert row.block_delta is not None
    return row.block_delta[int(without_class)]


def _run(
    model: PackedDiT, rows: Sequence[Row], owners: Sequence[int], x: Tensor, timesteps: Tensor, classes: Tensor
) -> tuple[Tensor, dict[int, Tensor]]:
    keep = [i for i, owner in enumerate(owners) if rows[owner].keeps_blocks]
    if not keep:
        return model.forward(x, timesteps, classes), {}
    output, deltas = model.forward_keeping(x, timesteps, classes, keep)
    positions: dict[int, list[int]] = {}
    for position, i in enumerate(keep):
        positions.setdefault(owners[i], []).append(position)
    # Copies: views would keep the whole batch alive.
    return output, {owner: taken(deltas, at) for owner, at in positions.items()}
