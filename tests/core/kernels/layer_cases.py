"""Small layers that the tests of the backends share, and when two backends agree on the codes of an input."""

from __future__ import annotations

import torch
from torch import nn

from robuq_core.kernels.ops import Modulation, Prologue, Quantized, TernaryLayer
from robuq_core.kernels.reference import ReferenceBackend, apply_prologue
from robuq_core.models.quant_linear import QuantLinear
from robuq_core.quant.activation import Grid, is_midrise
from robuq_core.quant.hadamard import Rotation, random_signs

REFERENCE = ReferenceBackend()
WIDTHS = (4, 12, 20, 28, 36, 72, 96, 256, 288)


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


def assert_quantized_agree(x: torch.Tensor, layer: TernaryLayer, prologue: Prologue, actual: Quantized) -> torch.Tensor:
    """Equal codes, save where ``|x / step - edge| < 1e-3`` for an edge between cells: there off by one cell.

    Returns where they differ, bool ``[M, K]``.
    """
    expected = REFERENCE.rotate_quantize(x, layer, prologue)
    torch.testing.assert_close(actual.scales, expected.scales, rtol=1e-5, atol=0)
    torch.testing.assert_close(actual.lowrank, expected.lowrank, rtol=1e-4, atol=1e-4)
    differ = actual.codes != expected.codes
    if differ.any():
        midrise = is_midrise(layer.bits, layer.grid)
        rotated = Rotation(layer.in_features, layer.signs, layer.rotation_block)(apply_prologue(x, prologue))
        position = rotated / (expected.scales[:, None] * (2 if midrise else 1)) + (0 if midrise else 0.5)
        assert ((position - position.round()).abs()[differ] < 1e-3).all()
        assert ((actual.codes.int() - expected.codes.int()).abs()[differ] == (2 if midrise else 1)).all()
    return differ
