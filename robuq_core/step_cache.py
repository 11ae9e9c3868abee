"""Step caching: steps that reuse what the blocks of an earlier step added to the tokens.

After the last block the tokens are ``e(x_t) + delta_t``: embedded, and what all blocks added to them. ``delta_t`` moves
slowly with the timestep (arXiv 2406.01125, 2407.01425), so a row may take ``e(x_t) + delta_s`` of an earlier step,
``s > t``, and go straight to the final layer, which still sees ``x_t`` and ``t``. The last step always runs the blocks:
no step after it would mend what is stale in the picture.

Each row keeps its own delta, float32 ``[L, D]``, and with guidance a second one. So rows that run their blocks and rows
that do not share a step, and no picture depends on its neighbours.
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
        owners: of each of the M rows of the model, the position in ``rows`` of the one it is for: each of ``rows``
            with its class, in order, then the guided ones again without a class.
    """
    reusing = [i for i, owner in enumerate(owners) if rows[owner].reuses_blocks]
    running = [i for i, owner in enumerate(owners) if not rows[owner].reuses_blocks]
    if not reusing:
        return _run(model, rows, owners, x, timesteps, classes)
    kept = torch.stack([_kept(rows[owners[i]], without_class=i >= len(rows)) for i in reusing])
    reused = model.forward_reusing(taken(x, reusing), timesteps[reusing], classes[reusing], kept)
    if not running:
        return reused, {}
    ran, deltas = _run(
        model, rows, [owners[i] for i in running], taken(x, running), timesteps[running], classes[running]
    )
    output = ran.new_empty(len(owners), *ran.shape[1:])
    output[reusing], output[running] = reused, ran
    return output, deltas


def _kept(row: Row, without_class: bool) -> Tensor:
    assert row.block_delta is not None
    return row.block_delta[int(without_class)]


def _run(
    model: PackedDiT, rows: Sequence[Row], owners: Sequence[int], x: Tensor, timesteps: Tensor, classes: Tensor
) -> tuple[Tensor, dict[int, Tensor]]:
    keep = [i for i, owner in enumerate(owners) if rows[owner].keeps_blocks]
    if not keep:
        return model.forward(x, timesteps, classes), {}
    output, deltas = model.forward_keeping(x, timesteps, classes, keep)
    places: dict[int, list[int]] = {}
    for place, i in enumerate(keep):
        places.setdefault(owners[i], []).append(place)
    # No views: they would keep the whole batch alive.
    return output, {owner: taken(deltas, at) for owner, at in places.items()}
