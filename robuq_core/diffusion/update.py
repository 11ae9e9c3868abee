"""What a sampler makes of the network's output: guidance, the estimate of the image, and ``x_t`` of the next timestep.

:func:`update` is the reference; a backend may do the same in one pass, with the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from robuq_core.config import Flavour
from robuq_core.diffusion.samplers import Coefficients
from robuq_core.staging import staged


class RowStep(NamedTuple):
    """A row's next step. ``scale``: of its guidance, None without; ``multistep``: it needs the estimate before;
    ``noise [C, H, W]``, on the CPU: to add ``std`` times of, None for none."""

    coefficients: Coefficients
    scale: float | None = None
    multistep: bool = False
    noise: Tensor | None = None


class Update(Protocol):
    """``x [B, C, H, W]`` of B rows one step on, and the estimates ``x_0``, both new and contiguous.

    ``previous_x0``: the estimates before, like ``x``. ``output [B + guided rows, C or more, H, W]``: the network's of
    all rows, then that without a class of the rows with a ``scale``, in order; guidance acts on the first
    ``guided_channels`` channels. ``clip``: ``x_0`` to -1 .. 1.
    """

    def __call__(
        self, x: Tensor, previous_x0: Tensor, output: Tensor, steps: Sequence[RowStep], clip: bool, guided_channels: int
    ) -> tuple[Tensor, Tensor]: ...


@runtime_checkable
class UpdatingBackend(Protocol):
    """A backend that takes all rows a step on in one pass, with the bits of :func:`update`."""

    update: Update


def guided_channels(channels: int, flavour: Flavour) -> int:
    """Number of leading channels that guidance acts on: 3 in the flavours ``official`` and ``sit``, else all."""
    return min(3, channels) if flavour in ("official", "sit") else channels


def guide(cond: Tensor, uncond: Tensor, scale: Tensor, guided: int) -> Tensor:
    """Classifier-free guidance per row, ``uncond + scale (cond - uncond)``, ``[B, C_out, H, W]``.

    ``scale``: float32 ``[B]``. Channels from ``guided`` on, including a learned variance, are those of ``cond``.
    """
    out = cond.clone()
    weight = scale[:, None, None, None]
    out[:, :guided] = uncond[:, :guided] + weight * (cond[:, :guided] - uncond[:, :guided])
    return out


def update(
    x: Tensor, previous_x0: Tensor, output: Tensor, steps: Sequence[RowStep], clip: bool, guided_channels: int
) -> tuple[Tensor, Tensor]:
    """See :class:`Update`. On a GPU, what it needs of the host goes there in one copy."""
    scales = {i: step.scale for i, step in enumerate(steps) if step.scale is not None}
    noises = {i: step.noise for i, step in enumerate(steps) if step.noise is not None}
    multistep = [i for i, step in enumerate(steps) if step.multistep]
    table, scale, noise, *places = staged(
        x.device,
        torch.tensor([step.coefficients for step in steps]),
        torch.tensor(list(scales.values())),
        _stacked(noises.values(), x),
        *(torch.tensor(list(rows), dtype=torch.int64) for rows in (scales, multistep, noises)),
    )
    guided_at, multistep_at, noisy_at = (_all_or(place, len(steps)) for place in places)
    c = table[..., None, None, None].unbind(1)
    prediction = output[: len(steps), : x.shape[1]]
    if scales:
        mixed = guide(prediction[guided_at], output[len(steps) :, : x.shape[1]], scale, guided_channels)
        if len(scales) < len(steps):
            prediction = prediction.clone()
            prediction[guided_at] = mixed
        else:
            prediction = mixed
    # Products and sums stay apart: a fused multiply-add would round by where an element lies in the tensor.
    x0 = (c[0] * x).add_(c[1] * prediction)
    if clip:
        x0.clamp_(-1, 1)
    following = (c[2] * x).add_(c[3] * x0)
    if multistep:
        following[multistep_at] += c[4][multistep_at] * previous_x0[multistep_at]
    if noises:
        following[noisy_at] += c[5][noisy_at] * noise
    return following, x0


def _stacked(noises: Iterable[Tensor], x: Tensor) -> Tensor:
    each = list(noises)
    return torch.stack(each) if each else torch.empty(0, *x.shape[1:])


def _all_or(rows: Tensor, total: int) -> Tensor | slice:
    """An index of ``rows``, which ascend; of all of them one that copies nothing."""
    return slice(None) if len(rows) == total else rows


def add_learned_noise(
    following: Tensor, output: Tensor, steps: Sequence[RowStep], noises: Mapping[int, Tensor]
) -> None:
    """``following[i] += std noises[i]`` in place for the rows i, where the variance in the second half of ``output``'s
    channels gives ``std``: its logarithm lies between the table's two."""
    coefficients = torch.tensor([steps[i].coefficients[-2:] for i in noises])
    rows = torch.tensor(list(noises), dtype=torch.int64)
    table, noise, places = staged(following.device, coefficients, _stacked(noises.values(), following), rows)
    at = _all_or(places, len(steps))
    log_beta, log_posterior = table[..., None, None, None].unbind(1)
    fraction = (output[: len(steps), following.shape[1] :][at] + 1) / 2
    std = 0.5 * (fraction * log_beta + (1 - fraction) * log_posterior)
    # Row by row: torch's vector and scalar exponentials differ, and the tensor's size decides where each runs.
    for row in std.unbind():
        row.exp_()
    following[at] += std * noise
