"""What a sampler makes of the network's output: guidance, the estimate of the image, and ``x_t`` of the next timestep.

:func:`update` is the reference; a backend may do the same in one pass, with the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from robuq_core.diffusion.guidance import guide
from robuq_core.diffusion.samplers import Coefficients


class RowStep(NamedTuple):
    """A row's next step. ``scale``: of its guidance, None without; ``previous``: the estimate before, ``[C, H, W]``, of
    multistep samplers; ``noise [C, H, W]``: to add ``std`` times of, None for none."""

    coefficients: Coefficients
    scale: float | None = None
    previous: Tensor | None = None
    noise: Tensor | None = None


class Update(Protocol):
    """``x [B, C, H, W]`` of B rows one step on, and the estimates ``x_0``, both new and contiguous.

    ``output [B + guided rows, C or more, H, W]``: the network's of all rows, then that without a class of the rows with
    a ``scale``, in order; guidance acts on the first ``guided_channels`` channels. ``clip``: ``x_0`` to -1 .. 1.
    """

    def __call__(
        self, x: Tensor, output: Tensor, steps: Sequence[RowStep], clip: bool, guided_channels: int
    ) -> tuple[Tensor, Tensor]: ...


@runtime_checkable
class UpdatingBackend(Protocol):
    """A backend that takes all rows a step on in one pass, with the bits of :func:`update`."""

    update: Update


def update(
    x: Tensor, output: Tensor, steps: Sequence[RowStep], clip: bool, guided_channels: int
) -> tuple[Tensor, Tensor]:
    """See :class:`Update`."""
    c = _columns(steps, x.device)
    prediction = _guided(output, steps, x.shape[1], guided_channels)
    # Products and sums stay apart: a fused multiply-add would round by where an element lies in the tensor.
    x0 = (c[0] * x).add_(c[1] * prediction)
    if clip:
        x0.clamp_(-1, 1)
    following = (c[2] * x).add_(c[3] * x0)
    for factor, terms in ((c[4], [step.previous for step in steps]), (c[5], [step.noise for step in steps])):
        rows = [i for i, term in enumerate(terms) if term is not None]
        if rows:
            following[rows] += factor[rows] * torch.stack([term for term in terms if term is not None]).to(x.device)
    return following, x0


def _columns(steps: Sequence[RowStep], device: torch.device) -> tuple[Tensor, ...]:
    table = torch.tensor([step.coefficients for step in steps], device=device)
    return table[..., None, None, None].unbind(1)


def _guided(output: Tensor, steps: Sequence[RowStep], channels: int, guided_channels: int) -> Tensor:
    cond = output[: len(steps), :channels]
    guided = [i for i, step in enumerate(steps) if step.scale is not None]
    if not guided:
        return cond
    scale = torch.tensor([steps[i].scale for i in guided], device=output.device)
    mixed = cond.clone()
    mixed[guided] = guide(cond[guided], output[len(steps) :, :channels], scale, guided_channels)
    return mixed


def add_learned_noise(following: Tensor, variance: Tensor, steps: Sequence[RowStep], noise: Sequence[Tensor]) -> None:
    """``following [B, C, H, W] += std noise`` in place, where the network's ``variance [B, C, H, W]`` says ``std``: its
    logarithm lies between the table's two."""
    _, _, _, _, _, _, log_beta, log_posterior = _columns(steps, following.device)
    fraction = (variance + 1) / 2
    std = 0.5 * (fraction * log_beta + (1 - fraction) * log_posterior)
    # Row by row: torch's vector and scalar exponentials differ, and the tensor's size decides where each runs.
    for row in std.unbind():
        row.exp_()
    following += std * torch.stack(list(noise)).to(following.device)
