"""The native backend against the reference, on each of its paths, and its two promises: exact integer products, and
rows whose bytes depend on neither their neighbours nor the thread count.

Paths that this processor lacks run on emulated instructions, from the same source: those of x86 by emulated.py, those
of AArch64 in a process under qemu-user (remote.py)."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import get_args

import emulated
import pytest
import remote
import torch
import torch.nn.functional as F
from agreement import (
    REFERENCE,
    assert_attention_agrees,
    assert_floats_agree,
    assert_products_agree,
    assert_quantized_agree,
    multiplies_bf16,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_cases import WIDTHS, make_linear, prologues, tokens

from robuq_core.kernels import cpu
from robuq_core.kernels.cpu import CpuBackend, Isa, NativeUnavailableError, choose_isa, load_library
from robuq_core.kernels.ops import Block, Ends, Modulation, Quantized, TernaryLayer
from robuq_core.kernels.pack_layer import pack_layer
from robuq_core.models.dit import patchify, unpatchify
from robuq_core.quant.activation import is_midrise
from robuq_core.quant.choices import Grid
from robuq_core.quant.packing import pack_planar

# Whole and incomplete groups of 128, one slice of the width and several.
PRODUCT_WIDTHS = (*WIDTHS, 128, 160, 224, 384, 640, 768, 1152, 1280, 1792, 2304, 2560)


def runs_here(isa: Isa) -> bool:
    try:
        return choose_isa(load_library(), isa) == isa
    except NativeUnavailableError:
        return False


# The paths of this processor; those that it lacks on emulated instructions. Emulating a path that runs shows nothing.
PATHS = [isa for isa in get_args(Isa) if runs_here(isa)] or ["plain"]
EMULATED = [isa for isa in ("amx", "avx512bf16", "avx512vbmi", "avx512vnni") if isa not in PATHS]
ARM = [isa for isa in ("i8mm", "dotprod", "neon") if isa not in PATHS]


@pytest.fixture(scope="session")
def emulated_library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return cpu.open_library(str(emulated.build(tmp_path_factory.mktemp("emulated"))))


@pytest.fixture(scope="session")
def arm_library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[remote.RemoteLibrary]:
    if reason := remote.missing(remote.ARM_COMPILER, remote.ARM_EMULATOR):
        pytest.skip(f"AArch64 cannot be emulated: {reason}")
    folder = tmp_path_factory.mktemp("arm")
    driver = remote.build(folder, remote.ARM_COMPILER[0])
    library = remote.RemoteLibrary([remote.ARM_EMULATOR[0], "-cpu", "max", driver], folder)
    yield library
    library.close()


ELSEWHERE = [*(f"emulated-{path}" for path in EMULATED), *(f"arm-{path}" for path in ARM)]


@pytest.fixture(params=[*PATHS, *(pytest.param(path, marks=pytest.mark.slow) for path in ELSEWHERE)])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> CpuBackend:
    kind, _, isa = request.param.rpartition("-")
    if kind:
        library = request.getfixturevalue(f"{kind}_library")
        monkeypatch.setattr(cpu, "load_library", lambda: library)
    monkeypatch.setenv("ROBUQ_CPU_ISA", isa)
    try:
        return CpuBackend(threads=2)
    except NativeUnavailableError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("grid", ["midrise", "midtread"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_rotate_quantize(backend: CpuBackend, bits: int, grid: Grid) -> None:
    for width in WIDTHS:
        for rows, rank in ((1, 0), (3, 2), (18, 3)):
            layer, x = pack_layer(make_linear(width, 7, bits=bits, grid=grid, rank=rank)), tokens(rows, width)
            for prologue in prologues(3 if rows % 3 == 0 else 1, width):
                assert_quantized_agree(
                    x, layer, prologue, backend.rotate_quantize(x, layer, prologue), multiplies_bf16(backend)
                )


@pytest.mark.parametrize(
    ("width", "block"), [(128, 1), (36, 1), (256, 128), (1152, 128), (4608, 128), (144, 36), (96, 4)]
)
def test_rotation_by_blocks(backend: CpuBackend, width: int, block: int) -> None:
    layer, x = pack_layer(make_linear(width, 7, bits=3, rank=2, rotation_block=block)), tokens(5, width)
    for prologue in prologues(1, width):
        assert_quantized_agree(
            x, layer, prologue, backend.rotate_quantize(x, layer, prologue), multiplies_bf16(backend)
        )


def bare_layer(weight: torch.Tensor, bits: int, grid: Grid = "midrise") -> TernaryLayer:
    """Unit scales, no bias and no low-rank term: its output is the integer product."""
    outputs, width = weight.shape
    return TernaryLayer(
        planar=pack_planar(weight),
        alpha=torch.ones(outputs),
        bias=torch.zeros(outputs),
        signs=torch.ones(width),
        lowrank_a=torch.zeros(outputs, 0, dtype=torch.bfloat16),
        lowrank_b=torch.zeros(0, width, dtype=torch.bfloat16),
        bits=bits,
        grid=grid,
    )


def assert_product_is_exact(backend: CpuBackend, rows: int, width: int, outputs: int, bits: int, grid: Grid) -> None:
    """Random codes of the grid and random weights, and the extreme ones that try the accumulators."""
    generator = torch.Generator().manual_seed(rows * width + outputs + bits)
    weight = torch.randint(-1, 2, (outputs, width), generator=generator).to(torch.int8)
    weight[0], weight[-1] = 1, -1
    cells = 2 ** (bits - 1)
    codes = torch.randint(-cells, cells, (rows, width), generator=generator)
    codes[0], codes[-1] = cells - 1, -cells
    if is_midrise(bits, grid):
        codes = 2 * codes + 1
    quantized = Quantized(codes.to(torch.int8), torch.ones(rows), torch.zeros(rows, 0))
    y = backend.ternary_linear(quantized, bare_layer(weight, bits, grid))
    assert torch.equal(y.long(), codes @ weight.long().T)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("width", [*WIDTHS, 1280, 4608])
def test_integer_product_is_exact(backend: CpuBackend, width: int, bits: int) -> None:
    for rows, outputs in ((2, 37), (9, 37), (9, 700)):
        for grid in get_args(Grid):
            assert_product_is_exact(backend, rows, width, outputs, bits, grid)


@pytest.mark.parametrize("bits", range(1, 9))
def test_integer_product_of_any_shape_is_exact(backend: CpuBackend, bits: int) -> None:
    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(
        rows=st.integers(1, 130),
        width=st.sampled_from(PRODUCT_WIDTHS),
        outputs=st.integers(1, 330),
        grid=st.sampled_from(get_args(Grid)),
    )
    def check(rows: int, width: int, outputs: int, grid: Grid) -> None:
        assert_product_is_exact(backend, rows, width, outputs, bits, grid)

    check()


@pytest.mark.parametrize(("rows", "outputs", "rank"), [(1, 1, 0), (3, 33, 5), (17, 70, 16), (150, 8, 1)])
def test_ternary_linear(backend: CpuBackend, rows: int, outputs: int, rank: int) -> None:
    for width in (36, 96, 128, 288):
        layer = pack_layer(make_linear(width, outputs, bits=3, rank=min(rank, outputs - 1)))
        quantized = REFERENCE.rotate_quantize(tokens(rows, width), layer)
        assert_products_agree(
            backend.ternary_linear(quantized, layer), quantized, layer, narrow=multiplies_bf16(backend)
        )


@pytest.mark.parametrize(("length", "heads", "head_dim"), [(1, 1, 1), (5, 3, 8), (64, 2, 72), (67, 1, 20)])
def test_attention(backend: CpuBackend, length: int, heads: int, head_dim: int) -> None:
    qkv = tokens(2 * length, 3 * heads * head_dim).reshape(2, length, -1)
    expected = REFERENCE.attention(qkv, heads, False)
    torch.testing.assert_close(backend.attention(qkv, heads, False), expected, rtol=1e-5, atol=1e-5)
    assert_attention_agrees(qkv, heads, backend.attention(qkv, heads, True))


@pytest.mark.parametrize("length", [256, 777, 1024, 4096])
@pytest.mark.parametrize("sd", [0.1, 1.0, 4.0])
def test_eight_bit_attention_of_many_tokens(
    backend: CpuBackend, length: int, sd: float, request: pytest.FixtureRequest
) -> None:
    """Diffuse heads and sharp ones; ``sd``: of their logits."""
    if any(path in request.node.name for path in ELSEWHERE) and length > 256:
        pytest.skip("slow where instructions are emulated")
    qkv = torch.randn(1, length, 3, 72, generator=torch.Generator().manual_seed(length))
    qkv[:, :, 0] *= sd
    qkv = qkv.flatten(2)
    assert_attention_agrees(qkv, 1, backend.attention(qkv, 1, True))


@pytest.mark.parametrize(("rows", "width", "outputs"), [(1, 1, 1), (5, 13, 7), (29, 77, 131), (50, 256, 64)])
def test_linear(backend: CpuBackend, rows: int, width: int, outputs: int) -> None:
    x, weight, bias = tokens(rows, width), tokens(outputs, width, seed=1), torch.randn(outputs)
    torch.testing.assert_close(backend.linear(x, weight, bias), REFERENCE.linear(x, weight, bias), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", [36, 96, 288])
def test_rows_are_byte_equal_alone_among_others_and_on_any_thread_count(backend: CpuBackend, width: int) -> None:
    layer, x = pack_layer(make_linear(width, 45, bits=2, rank=3)), tokens(140, width)
    weight, bias = tokens(45, width, seed=2), torch.randn(45)
    qkv = tokens(4 * 35, 3 * width).reshape(4, 35, -1)
    single, four = (CpuBackend(threads=n, isa=backend.isa) for n in (1, 4))
    for prologue in prologues(4, width):
        whole = backend.rotate_quantize(x, layer, prologue)
        y = backend.ternary_linear(whole, layer)
        for other in (single, four):
            again = other.rotate_quantize(x, layer, prologue)
            assert torch.equal(again.codes, whole.codes)
            assert torch.equal(again.scales, whole.scales)
            assert torch.equal(again.lowrank, whole.lowrank)
            assert torch.equal(other.ternary_linear(again, layer), y)
        for row in (0, 1, 77, 139):
            image = row // 35
            own = prologue
            if isinstance(prologue, Modulation):
                own = Modulation(prologue.shift[image : image + 1], prologue.scale[image : image + 1], prologue.eps)
            alone = backend.rotate_quantize(x[row : row + 1], layer, own)
            assert torch.equal(alone.codes[0], whole.codes[row])
            assert torch.equal(alone.scales[0], whole.scales[row])
            assert torch.equal(alone.lowrank[0], whole.lowrank[row])
            assert torch.equal(backend.ternary_linear(alone, layer)[0], y[row])
    linear = backend.linear(x, weight, bias)
    assert torch.equal(four.linear(x, weight, bias), linear)
    for row in (0, 23, 25, 139):
        assert torch.equal(backend.linear(x[row : row + 1], weight, bias)[0], linear[row])
    for quantized in (False, True):
        attended = backend.attention(qkv, 3, quantized)
        assert torch.equal(four.attention(qkv, 3, quantized), attended)
        for image in range(4):
            assert torch.equal(backend.attention(qkv[image : image + 1], 3, quantized)[0], attended[image])


def test_fused_calls_give_the_same_bytes(backend: CpuBackend) -> None:
    layer = pack_layer(make_linear(96, 70, bits=2, rank=3))
    for rows in (3, 30):
        x, residual = tokens(rows, 96), tokens(rows, 70, seed=4)
        gate = torch.randn(3, 2, 70, generator=torch.Generator().manual_seed(6))[:, 0]  # rows lie apart
        for prologue in prologues(3, 96):
            y = backend.ternary_linear(backend.rotate_quantize(x, layer, prologue), layer)
            assert torch.equal(backend.ternary(x, layer, prologue), y)
            sum_ = residual.clone()
            backend.add_ternary(sum_, gate, x, layer, prologue)
            assert torch.equal(sum_, residual + y * gate.repeat_interleave(rows // 3, dim=0))
    with pytest.raises(ValueError, match=r"gate must be torch.float32 \(3, 70\)"):
        backend.add_ternary(residual, torch.zeros(3, 69), x, layer)
    with pytest.raises(ValueError, match="residual must be contiguous"):
        backend.add_ternary(tokens(30, 140)[:, ::2], gate, x, layer)
    with pytest.raises(ValueError, match="30 rows do not divide among 4 images"):
        backend.add_ternary(residual, torch.zeros(4, 70), x, layer)


def make_block(width: int, hidden: int, heads: int, quantized: bool) -> Block:
    shapes = ((width, 3 * width), (width, width), (width, hidden), (hidden, width))
    layers = (pack_layer(make_linear(*shape, bits=2, rank=3)) for shape in shapes)
    return Block(*layers, heads, quantized, (1e-6, 1e-5))


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize(("width", "hidden", "heads"), [(36, 144, 3), (96, 72, 4), (128, 512, 2)])
def test_a_block_in_one_call_gives_the_same_bytes(
    backend: CpuBackend, width: int, hidden: int, heads: int, quantized: bool
) -> None:
    block = make_block(width, hidden, heads, quantized)
    for images, length in ((1, 1), (2, 5), (3, 16)):
        x = tokens(images * length, width).reshape(images, length, width)
        modulation = tokens(6 * images, width + 3, seed=2).reshape(6, images, -1)[..., :width]  # rows lie apart
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unbind()
        expected, flat = x.clone(), (images * length, width)
        qkv = backend.ternary(expected.reshape(flat), block.qkv, Modulation(shift1, scale1, 1e-6))
        heads_out = backend.attention(qkv.reshape(images, length, -1), heads, quantized)
        backend.add_ternary(expected.view(flat), gate1, heads_out.reshape(flat), block.proj)
        hidden_out = backend.ternary(expected.reshape(flat), block.fc1, Modulation(shift2, scale2, 1e-5))
        backend.add_ternary(expected.view(flat), gate2, hidden_out, block.fc2, "gelu")
        backend.add_block(x, modulation, block)
        assert torch.equal(x, expected)


def make_ends(side: int, patch: int, width: int) -> Ends:
    """Of 3 channels in and 2 out."""

    def dense(outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
        return tokens(outputs, inputs, seed=1) / inputs**0.5, tokens(1, outputs, seed=2)[0]

    shapes = (width, 3 * patch**2), (2 * patch**2, width), (2 * width, width)
    return Ends(*(dense(*shape) for shape in shapes), tokens(side * side, width, seed=3), patch, 3, 2, side == 3)


@pytest.mark.parametrize(("side", "patch", "width"), [(1, 2, 12), (3, 1, 36), (2, 16, 96), (5, 2, 20)])
def test_the_ends_of_a_network(backend: CpuBackend, side: int, patch: int, width: int) -> None:
    """Against torch; alone, among others and on other thread counts with the same bytes."""
    if backend.isa in ARM:
        pytest.skip("the driver of emulated AArch64 has blocks and layers only")
    ends, single = make_ends(side, patch, width), CpuBackend(threads=1, isa=backend.isa)
    adaln = [pack_layer(make_linear(width, 6 * width, bits=4)) for _ in range(2)]
    images = torch.randn(4, 3, side * patch, side * patch)
    x = backend.embed(images, ends)
    expected = REFERENCE.linear(patchify(images, patch).flatten(0, 1), *ends.embedder).reshape(x.shape) + ends.position
    assert_floats_agree(x, expected)
    modulation, c = tokens(2 * 4, width + 1, seed=4).reshape(2, 4, -1)[..., :width], tokens(4, width, seed=5)
    output = backend.output(x, modulation, ends)
    shift, scale = modulation[:, :, None]
    normed = F.layer_norm(x, (width,), eps=1e-6) * (1 + scale) + shift
    expected = unpatchify(REFERENCE.linear(normed.flatten(0, 1), *ends.last).reshape(4, side**2, -1), patch, 2)
    assert_floats_agree(output, -expected if ends.negated else expected)
    table, slots = torch.zeros(14, 7, width), torch.tensor([5, 0, 6, 3])
    backend.modulate(c, adaln, ends, table, slots)
    parts = [backend.ternary(c, layer, "silu") for layer in adaln]
    expected = torch.cat([*parts, REFERENCE.linear(F.silu(c), *ends.modulation)], dim=1).reshape(4, 14, width)
    assert_floats_agree(table[:, slots].transpose(0, 1), expected)
    assert not table[:, [1, 2, 4]].any()
    for i in (0, 3):
        assert torch.equal(single.embed(images[i : i + 1], ends)[0], x[i])
        assert torch.equal(single.output(x[i : i + 1], modulation[:, i : i + 1], ends)[0], output[i])
        alone = torch.zeros(14, 1, width)
        single.modulate(c[i : i + 1], adaln, ends, alone, torch.tensor([0]))
        assert torch.equal(alone[:, 0], table[:, slots[i]])


def test_what_is_no_end_is_refused(backend: CpuBackend) -> None:
    ends, table = make_ends(2, 2, 12), torch.zeros(2, 3, 12)
    with pytest.raises(ValueError, match=r"images must be torch.float32 \(1, 3, 4, 4\)"):
        backend.embed(torch.zeros(1, 3, 4, 5), ends)
    with pytest.raises(ValueError, match=r"modulation must be torch.float32 \(2, 1, 12\)"):
        backend.output(torch.zeros(1, 4, 12), torch.zeros(2, 2, 12), ends)
    with pytest.raises(ValueError, match="slots must be from 0 to 2"):
        backend.modulate(torch.zeros(1, 12), (), ends, table, torch.tensor([3]))
    with pytest.raises(ValueError, match="table must be contiguous"):
        backend.modulate(torch.zeros(1, 12), (), ends, table.expand(2, 3, 12)[:, ::2], torch.tensor([0]))
    layer = pack_layer(make_linear(12, 7, bits=4))
    with pytest.raises(ValueError, match="12 inputs and 72 outputs"):
        backend.modulate(torch.zeros(1, 12), (layer,), ends, torch.zeros(8, 3, 12), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"last.weight must be torch.float32 \(8, 12\)"):
        backend.embed(torch.zeros(1, 3, 4, 4), replace(ends, last=ends.embedder))


def test_what_is_no_block_is_refused(backend: CpuBackend) -> None:
    block = make_block(36, 144, 3, True)
    with pytest.raises(ValueError, match="modulation"):
        backend.add_block(torch.zeros(2, 4, 36), torch.zeros(6, 1, 36), block)
    with pytest.raises(ValueError, match="x must be contiguous"):
        backend.add_block(torch.zeros(2, 4, 72)[..., ::2], torch.zeros(6, 2, 36), block)
    with pytest.raises(ValueError, match="5 heads"):
        backend.add_block(torch.zeros(2, 4, 36), torch.zeros(6, 2, 36), replace(block, num_heads=5))
    with pytest.raises(ValueError, match="no block"):
        backend.add_block(torch.zeros(2, 4, 36), torch.zeros(6, 2, 36), replace(block, fc2=block.fc1))


def status_kib(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise AssertionError(name)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("quantized", [True, False])
def test_attention_holds_no_matrix_of_all_pairs_of_tokens(
    backend: CpuBackend, quantized: bool, request: pytest.FixtureRequest
) -> None:
    if any(path in request.node.name for path in ELSEWHERE):
        pytest.skip("slow where instructions are emulated")
    length = 4096  # a byte for each pair of tokens is 16 MiB
    qkv = tokens(length, 3 * 8).reshape(1, length, -1)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status_kib("VmHWM")
    backend.attention(qkv, 1, quantized)
    assert status_kib("VmHWM") - before < 8 * 1024


def results_of_all_ops(backend: CpuBackend) -> list[torch.Tensor]:
    """Odd shapes and every prologue."""
    results = []
    for width in (4, 12, 20, 28, 36, 72, 96, 288, 1152):
        layer = pack_layer(make_linear(width, 70, bits=3, rank=3))
        x, gate = tokens(18, width), tokens(3, 70, seed=4)
        for prologue in prologues(3, width):
            quantized, total = backend.rotate_quantize(x, layer, prologue), tokens(18, 70, seed=3)
            backend.add_ternary(total, gate, x, layer, prologue)
            results += [quantized.codes, quantized.scales, quantized.lowrank, total]
    for length, heads, head_dim in ((1, 1, 1), (5, 3, 8), (67, 1, 20), (64, 2, 72), (77, 1, 33)):
        qkv = tokens(2 * length, 3 * heads * head_dim).reshape(2, length, -1)
        results += [backend.attention(qkv, heads, quantized) for quantized in (True, False)]
    x, weight, bias = tokens(29, 77), tokens(131, 77, seed=1), tokens(1, 131)[0]
    return [*results, backend.linear(x, weight, bias)]


def test_aarch64_gives_the_bits_of_portable_code_and_of_avx2(
    backend: CpuBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend.isa not in ("i8mm", "dotprod", "neon"):
        pytest.skip("a promise of the AArch64 paths")
    others = [CpuBackend(threads=1, isa="plain")]
    if "avx2" in PATHS:
        monkeypatch.setattr(cpu, "load_library", load_library)
        others.append(CpuBackend(threads=1, isa="avx2"))
    ours = results_of_all_ops(backend)
    for other in others:
        assert all(map(torch.equal, ours, results_of_all_ops(other))), other.isa


def test_tiles_give_the_bytes_of_dot_products(backend: CpuBackend) -> None:
    """Head widths of whole tiles and of their edges, and rows of every number modulo a tile's."""
    if backend.isa != "amx":
        pytest.skip("a promise of the tiles")
    other = CpuBackend(threads=2, isa="avx512vnni")
    for length, heads, head_dim in ((15, 2, 4), (16, 1, 64), (33, 1, 130), (48, 3, 100), (80, 1, 144), (129, 1, 72)):
        qkv = tokens(2 * length, 3 * heads * head_dim).reshape(2, length, -1)
        assert torch.equal(backend.attention(qkv, heads, True), other.attention(qkv, heads, True))


@pytest.mark.slow
def test_emulated_bfloat16_gives_the_bits_of_the_processor(
    emulated_library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the low-rank branch, subnormal and huge values too. SIMDe fuses no multiply-adds: not of the prologues."""
    if "avx512bf16" not in PATHS:
        pytest.skip("this processor does not multiply bfloat16")
    here = CpuBackend(threads=1, isa="avx512bf16")
    monkeypatch.setattr(cpu, "load_library", lambda: emulated_library)
    there = CpuBackend(threads=1, isa="avx512bf16")
    for scale, width in product((1e-40, 1e-37, 1e-36, 1.0, 1e34), (20, 36, 96, 1152)):
        layer, x = pack_layer(make_linear(width, 70, bits=3, rank=5)), tokens(18, width) * scale
        ours, theirs = (backend.rotate_quantize(x, layer) for backend in (here, there))
        assert ours.lowrank.any() or scale < 1e-36
        assert torch.equal(ours.lowrank, theirs.lowrank)
        assert torch.equal(here.ternary_linear(ours, layer), there.ternary_linear(theirs, layer))


def test_calls_of_several_python_threads_on_one_object(backend: CpuBackend) -> None:
    layer, x = pack_layer(make_linear(96, 64, bits=2, rank=2)), tokens(50, 96)
    expected = backend.ternary_linear(backend.rotate_quantize(x, layer), layer)

    def run(_: int) -> bool:
        return torch.equal(backend.ternary_linear(backend.rotate_quantize(x, layer), layer), expected)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(200)))


def test_views_are_accepted_and_wrong_shapes_refused(backend: CpuBackend) -> None:
    layer, wide = pack_layer(make_linear(36, 8, bits=2)), tokens(4, 72)
    view = wide[:, ::2]
    assert torch.equal(backend.rotate_quantize(view, layer).codes, backend.rotate_quantize(view.clone(), layer).codes)
    with pytest.raises(ValueError, match=r"x must be torch.float32 \(4, 36\)"):
        backend.rotate_quantize(wide, layer)
    with pytest.raises(ValueError, match="3 rows do not divide among 2 images"):
        backend.rotate_quantize(tokens(3, 36), layer, Modulation(torch.zeros(2, 36), torch.zeros(2, 36), 1e-6))
    with pytest.raises(ValueError, match="5 heads"):
        backend.attention(torch.zeros(1, 2, 36), 5, True)
    with pytest.raises(ValueError, match="'relu'"):
        backend.rotate_quantize(tokens(3, 36), layer, "relu")  # type: ignore[arg-type]


def test_no_rows_give_no_rows(backend: CpuBackend) -> None:
    layer = pack_layer(make_linear(36, 8, bits=2, rank=1))
    assert backend.ternary_linear(backend.rotate_quantize(torch.zeros(0, 36), layer), layer).shape == (0, 8)


def test_non_finite_tokens_stay_in_their_rows(backend: CpuBackend) -> None:
    layer, x = pack_layer(make_linear(96, 8, bits=2, rank=1)), tokens(3, 96)
    clean = backend.ternary_linear(backend.rotate_quantize(x, layer), layer)
    x[1, 4] = float("nan")
    y = backend.ternary_linear(backend.rotate_quantize(x, layer), layer)
    assert torch.equal(y[[0, 2]], clean[[0, 2]])
    assert y[1].isnan().all()


def test_environment_forces_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        library = load_library()
    except NativeUnavailableError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("ROBUQ_CPU_ISA", "plain")
    assert choose_isa(library) == "plain"
    assert CpuBackend(threads=1).name == "cpu-plain"
    monkeypatch.setenv("ROBUQ_CPU_ISA", "sse9")
    with pytest.raises(ValueError, match=r"amx, .*, neon, plain, not 'sse9'"):
        choose_isa(library)
    monkeypatch.delenv("ROBUQ_CPU_ISA")
    with pytest.raises(ValueError, match="threads must be at least 1"):
        CpuBackend(threads=0)


class Processor:
    """A library on a processor that runs ``paths``."""

    def __init__(self, *paths: Isa) -> None:
        self.codes = [cpu._ISA_CODE[path] for path in ("plain", *paths)]

    def robuq_supports(self, isa: int) -> int:
        return int(isa in self.codes)


@pytest.mark.parametrize(
    ("paths", "fastest"),
    [
        ((), "plain"),
        (("avx2",), "avx2"),
        (("avx2", "avx512vnni", "avx512vbmi"), "avx512vbmi"),
        (("avx2", "avx512vnni", "avx512vbmi", "avx512bf16"), "avx512bf16"),
        (("neon",), "neon"),
        (("neon", "dotprod"), "dotprod"),
        (("neon", "dotprod", "i8mm"), "i8mm"),
    ],
)
def test_the_fastest_path_that_runs_is_chosen(
    monkeypatch: pytest.MonkeyPatch, paths: tuple[Isa, ...], fastest: Isa
) -> None:
    monkeypatch.delenv("ROBUQ_CPU_ISA", raising=False)
    assert choose_isa(Processor(*paths)) == fastest  # type: ignore[arg-type]
    with pytest.raises(NativeUnavailableError, match="no amx"):
        choose_isa(Processor(*paths), "amx")  # type: ignore[arg-type]
