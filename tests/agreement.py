"""When two computations of one network agree, in whatever order a processor's float library adds.

Floats differ in their last bits, so a value that lies next to the edge of a quantiser's cell may fall to either side.
What holds everywhere:

- one layer, the same input: equal codes, save within :data:`EDGE` of a cell's edge, where they may differ by one cell
  (:func:`assert_quantized_agree`);
- equal codes: outputs equal to rounding (:func:`assert_products_agree`);
- 8-bit attention: equal to rounding, save where a code of an exponential is next to an edge
  (:func:`assert_attention_agrees`);
- floats without codes between: equal to rounding of the largest of them (:func:`assert_floats_agree`);
- a network: a code that has moved changes what follows in its image, so no bound on a single image holds. Few images
  have one, and the share of moved codes is small (:func:`assert_networks_agree`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robuq_core.checkpoint import Checkpoint
from robuq_core.config import ModelConfig
from robuq_core.kernels.cpu import CpuBackend
from robuq_core.kernels.ops import Backend, Prologue, Quantized, TernaryLayer
from robuq_core.kernels.reference import ReferenceBackend, apply_prologue
from robuq_core.models.dit import DiT
from robuq_core.models.packed_dit import PackedDiT
from robuq_core.models.quant_linear import QuantLinear, is_adaln, quantizable_linears
from robuq_core.quant.activation import GAUSSIAN_STEP, is_midrise, quantize_activation
from robuq_core.quant.attention import UNSIGNED_TOP, quantize_signed
from robuq_core.quant.hadamard import Rotation
from robuq_core.quant.packing import unpack_planar

REFERENCE = ReferenceBackend()
_COMPARED_QUERIES = 256

# In cells. A float32 sum of K terms of size sigma errs by about K 2^-24 / sqrt(2) sigma, and is divided by sqrt(K): by
# 3e-6 sigma for K = 4608, which is 1e-4 of a cell at 8 bits. Ten times that is for the worst of a million.
EDGE = 1e-3
# Of all codes of a run. In 800 runs of 3 to 15 images with random orders of addition at most 0.11 moved, at 8 bits.
MOVED_SHARE = 0.25
UNMOVED_ERROR = 1e-3
BF16_ROUNDING = 2**-8  # relative, of a value to the nearest


def multiplies_bf16(backend: Backend) -> bool:
    """Whether its low-rank branch rounds operands to bfloat16, and so moves values by up to 2^-8 of that branch."""
    return isinstance(backend, CpuBackend) and backend.isa in ("amx", "avx512bf16")


def assert_floats_agree(actual: Tensor, expected: Tensor) -> None:
    """To 1e-4 of the largest value.

    Some layers of float32 err by about 1e-6 of it. Guidance and a sampler's first step scale value and error alike.
    """
    assert float((actual - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


def assert_quantized_agree(
    x: Tensor, layer: TernaryLayer, prologue: Prologue, actual: Quantized, narrow: bool = False
) -> Tensor:
    """Equal codes, save where ``|x / step - edge| < EDGE`` for an edge between cells: there off by one cell.

    Returns where they differ, bool ``[M, K]``. ``narrow``: the low-rank branch rounds its operands to bfloat16.
    """
    expected = REFERENCE.rotate_quantize(x, layer, prologue)
    rotated = Rotation(layer.in_features, layer.signs, layer.rotation_block)(apply_prologue(x, prologue))
    torch.testing.assert_close(actual.scales, expected.scales, rtol=1e-5, atol=0)
    allowed = 1e-4 * (1 + expected.lowrank.abs())
    if narrow:
        allowed += BF16_ROUNDING * rotated.abs() @ layer.lowrank_b.float().abs().T
    assert ((actual.lowrank - expected.lowrank).abs() <= allowed).all()
    differ = actual.codes != expected.codes
    if differ.any():
        midrise = is_midrise(layer.bits, layer.grid)
        position = rotated / (expected.scales[:, None] * (2 if midrise else 1)) + (0 if midrise else 0.5)
        assert ((position - position.round()).abs()[differ] < EDGE).all()
        assert ((actual.codes.int() - expected.codes.int()).abs()[differ] == (2 if midrise else 1)).all()
    return differ


def assert_attention_agrees(qkv: Tensor, heads: int, actual: Tensor) -> None:
    """Eight-bit attention of ``qkv [B, L, 3 D]``, as exact as the edges between codes of exponentials leave it.

    A code whose place ``255 exp(l - max)`` lies within EDGE, plus what float32 makes of the logits, of an edge may fall
    either way; it moves its row by ``(v_j - out) / total``. Rows without one agree to 1e-5 of the largest value.
    Compared are at most 256 queries, evenly spaced.
    """
    images, length, triple = qkv.shape
    split = qkv.reshape(images, length, 3, heads, triple // 3 // heads).permute(2, 0, 3, 1, 4)
    (q, q_scale), (k, k_scale), (v, v_scale) = (
        [part.double() for part in quantize_signed(x, dims)]
        for x, dims in zip(split, ((-1,), (-1,), (-2, -1)), strict=True)
    )
    rows = torch.arange(0, length, -(-length // _COMPARED_QUERIES))
    q, q_scale, actual = q[:, :, rows], q_scale[:, :, rows], actual[:, rows]
    logits = (q @ k.transpose(-2, -1)) * q_scale * k_scale.transpose(-2, -1) * q.shape[-1] ** -0.5
    largest = logits.amax(dim=-1, keepdim=True)
    place = UNSIGNED_TOP * (logits - largest).exp()
    codes, v = place.round(), v * v_scale
    total = codes.sum(dim=-1, keepdim=True)
    exact = codes @ v / total
    unsure = place * (logits.abs() + largest.abs()) * 2**-22 + EDGE
    on_edge = ((place - place.floor() - 0.5).abs() < unsure).double()
    many = on_edge.sum(dim=-1, keepdim=True)
    allowed = (on_edge @ v.abs() + many * exact.abs()) / (total - many) + 1e-5 * v.abs().max()
    got = actual.double().reshape(images, len(rows), heads, -1).transpose(1, 2)
    assert bool(((got - exact).abs() <= allowed).all())


def assert_products_agree(
    actual: Tensor, x: Quantized, layer: TernaryLayer, additions: int = 0, narrow: bool = False
) -> None:
    """``actual [M, N]`` is the layer's output for these codes, to rounding.

    The integer product is exact; two factors and ``rank + 1`` additions follow, each off by 2^-23 of its terms at most.
    ``additions``: of floats that made the product where it is not of integers. ``narrow``: as of
    :func:`assert_quantized_agree`.
    """
    weight = unpack_planar(layer.planar, layer.in_features).double()
    scales = x.scales[:, None].double() * layer.alpha.double()
    terms = x.lowrank.double()[:, None] * layer.lowrank_a.double()
    expected = (x.codes.double() @ weight.T) * scales + terms.sum(dim=-1) + layer.bias.double()
    size = (x.codes.double().abs() @ weight.abs().T) * scales + terms.abs().sum(dim=-1) + layer.bias.double().abs()
    allowed = (additions + layer.rank + 4) * 2**-23 * size
    if narrow:
        allowed += BF16_ROUNDING * terms.abs().sum(dim=-1)
    assert ((actual.double() - expected).abs() <= allowed).all()


class Recorded:
    """A backend that keeps the codes of its calls in :attr:`codes`, int8 ``[M, K]`` each. It runs a layer in two calls,
    which give the same bits as one."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.name, self.device = backend.name, backend.device
        self.codes: list[Tensor] = []
        if hasattr(backend, "activations"):
            self.activations = backend.activations

    def rotate_quantize(self, x: Tensor, layer: TernaryLayer, prologue: Prologue = None) -> Quantized:
        quantized = self._backend.rotate_quantize(x, layer, prologue)
        self.codes.append(quantized.codes.cpu())
        return quantized

    def ternary_linear(self, x: Quantized, layer: TernaryLayer, *dtype: torch.dtype) -> Tensor:
        return self._backend.ternary_linear(x, layer, *dtype)

    def attention(self, qkv: Tensor, num_heads: int, quantized: bool) -> Tensor:
        return self._backend.attention(qkv, num_heads, quantized)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return self._backend.linear(x, weight, bias)


@dataclass
class Run:
    """What a network of images ``[B, ...]`` gave, and the codes of each linear of its blocks, int8 ``[B L, K]``."""

    output: Tensor
    codes: list[Tensor]


def run_packed(
    config: ModelConfig, checkpoint: Checkpoint, backend: Backend, x: Tensor, timesteps: Tensor, classes: Tensor
) -> Run:
    recorded = Recorded(backend)
    network = PackedDiT(config, checkpoint.dense, checkpoint.layers, recorded)
    with torch.inference_mode():
        output = network.forward(x, timesteps.tolist(), classes.tolist())
    # The modulations have a row for each timestep and class, the blocks one for each token.
    return Run(output, [codes for codes in recorded.codes if len(codes) == len(x) * config.num_tokens])


def run_training(model: DiT, x: Tensor, timesteps: Tensor, classes: Tensor) -> Run:
    """The fake-quantised network of training."""
    codes: list[Tensor] = []

    def keep(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, QuantLinear)
        codes.append(quantize_activation(layer.rotation(inputs[0]), layer.bits, layer.grid)[0].flatten(0, -2))

    layers = [layer for name, layer in quantizable_linears(model) if not is_adaln(name)]
    hooks = [layer.register_forward_pre_hook(keep) for layer in layers]
    try:
        with torch.inference_mode():
            return Run(model(x, timesteps, classes), codes)
    finally:
        for hook in hooks:
            hook.remove()


def relative_errors(ours: Tensor, theirs: Tensor) -> Tensor:
    """Of each image, float32 ``[B]``."""
    return (ours - theirs).flatten(1).norm(dim=1) / theirs.flatten(1).norm(dim=1)


def assert_networks_agree(ours: Run, theirs: Run, bits: int, narrow: bool = False) -> None:
    """Two runs of one network on the same images, both of ``bits`` wide codes.

    A share s of codes off by one step moves a layer's output by about ``step sqrt(s)`` of its size. Without a moved
    code only those of the attention products (8 bits) can differ.

    Args:
        narrow: activations are rounded to bfloat16 in between, whose ties move values by 2^-8 now and then.
    """
    images = len(ours.output)
    assert [each.shape for each in ours.codes] == [each.shape for each in theirs.codes]
    pairs = [(a != b).reshape(images, -1) for a, b in zip(ours.codes, theirs.codes, strict=True)]
    share = torch.cat(pairs, dim=1).float().mean(dim=1)
    errors = relative_errors(ours.output, theirs.output)
    assert float(share.mean()) < MOVED_SHARE, share
    if not narrow:
        assert int((share > 0).sum()) <= (images + 1) // 2, share
    assert (errors <= UNMOVED_ERROR + 3 * GAUSSIAN_STEP[bits] * share.sqrt()).all(), (errors, share)
