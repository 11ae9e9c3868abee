"""Small layers that the tests of the backends share."""

from __future__ import annotations

import torch
from torch import nn

from robuq_core.kernels.ops import Modulation, Prologue
from robuq_core.models.quant_linear import QuantLinear
from robuq_core.quant.choices import Grid
from robuq_core.quant.hadamard import random_signs

WIDTHS = (4, 12, 20, 28, 36, 72, 96, 192, 256, 288, 320, 576)


def make_linear(
    width: int,
    outputs: int,
    *,
    bits: int,
    grid: Grid = "midrise",
    rank: int = 0,
    planes: int = 1,
    rotation_block: int | None = None,
) -> QuantLinear:
    """A fake-quantised linear with random weights, bias and signs, the same on every call."""
    generator = torch.Generator().manual_seed(width * 1000 + outputs)
    linear = nn.Linear(width, outputs)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(outputs, width, generator=generator) / width**0.5)
        linear.bias.copy_(torch.randn(outputs, generator=generator))
    signs = random_signs(width, generator)
    return QuantLinear(
        linear,
        bits=bits,
        grid=grid,
        weight_scale="conditional_mean",
        rank=rank,
        signs=signs,
        rotation_block=rotation_block,
        weight_planes=planes,
    )


def tokens(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    """Random tokens ``[rows, width]`` of uneven size, one channel an outlier."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator) * torch.rand(rows, 1, generator=generator).add(0.1)
    x[:, width // 2] *= 10
    return x


def prologues(images: int, width: int) -> list[Prologue]:
    """One of each kind."""
    generator = torch.Generator().manual_seed(5)
    shift, scale = (torch.randn(images, width, generator=generator) for _ in range(2))
    return [None, "gelu", "silu", Modulation(shift, scale, 1e-6)]
