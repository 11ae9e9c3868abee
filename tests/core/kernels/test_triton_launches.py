"""How the Triton kernels are launched: nothing compiles while requests wait, parts and groups keep every bit."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from layer_cases import make_linear, tokens

pytest.importorskip("triton")

from ptx.driver import emulated

from robuq_core.errors import UserError
from robuq_core.kernels.ops import LayerGroup
from robuq_core.kernels.pack_layer import pack_layer
from robuq_core.kernels.triton import async_linear, attention, dense_linear, rotate_quantize, ternary_linear
from robuq_core.kernels.triton.backend import ACTIVATIONS_VARIABLE, TritonBackend
from robuq_core.kernels.triton.config import LaunchConfig, checked, compiling, launching
from robuq_core.kernels.triton.weights import folded
from robuq_core.quant.hadamard import Rotation

MODULES = (async_linear, attention, dense_linear, rotate_quantize, ternary_linear)
KERNELS = {name: each for module in MODULES for name, each in vars(module).items() if name.endswith("_kernel")}


@pytest.fixture
def ops() -> Iterator[TritonBackend]:
    with emulated(90):
        yield TritonBackend(activations=torch.float32)


@pytest.mark.parametrize("name", KERNELS)
def test_no_number_of_a_request_is_compiled_for(name: str) -> None:
    """What is no address is the same for every request, or one kernel takes all its values. N is a layer's width."""
    numbers = [each for each in KERNELS[name].params if not each.is_constexpr and not each.name.endswith("_ptr")]
    assert [each.name for each in numbers if not each.do_not_specialize] in ([], ["N"])


def test_adaln_of_all_blocks_has_the_bits_of_each_and_compiles_once(ops: TritonBackend) -> None:
    layers = [pack_layer(make_linear(36, 70, bits=4, rank=3)) for _ in range(2)]
    layers[1].planar.bitwise_xor_(layers[1].planar & 1)
    layers[1].signs.neg_()
    group = LayerGroup.of(layers)
    assert group is not None
    assert group.layers[1].planar.data_ptr() == group.stacked.planar[1].data_ptr()
    compiled: list[int] = []
    kernels = rotate_quantize.rotate_quantize_kernel, ternary_linear.ternary_linear_kernel
    for pairs in (1, 16, 17, 33):
        x = tokens(pairs, 36)
        before = sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())
        found = ops.ternary_each(x, group, "silu")
        after = sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())
        compiled.append(after - before)
        for layer, y in zip(layers, found, strict=True):
            assert torch.equal(y, ops.ternary_linear(ops.rotate_quantize(x, layer, "silu"), layer))
    assert compiled[1:] == [0, 0, 0]


def test_layers_that_differ_are_no_group() -> None:
    one, other, planes = (pack_layer(make_linear(36, 8, bits=b, planes=p)) for b, p in ((2, 1), (3, 1), (2, 2)))
    assert LayerGroup.of([one, other]) is None
    assert LayerGroup.of([planes, planes]) is None


@pytest.mark.parametrize("split", [2, 4])
def test_parts_of_k_add_up_to_the_same_bits(ops: TritonBackend, split: int) -> None:
    """With low rank, GELU and all; and the counters are ready for the next launch."""
    layer, x = pack_layer(make_linear(1152, 70, bits=3, rank=3)), tokens(5, 1152)
    quantized = ops.rotate_quantize(x, layer)
    whole, parts = (LaunchConfig({"ROWS": 16, "OUTPUTS": 64, "GROUP": 8, "SPLIT": each}, 4, 3) for each in (1, split))
    for gelu in (False, True):
        expected = ops.ternary_linear(quantized, layer, gelu=gelu, config=whole)
        assert torch.equal(ops.ternary_linear(quantized, layer, gelu=gelu, config=parts), expected)
        assert not ops._arrived.any()


@pytest.mark.parametrize(("width", "block"), [(36, None), (288, None), (384, 128), (72, 1)])
def test_the_folded_factor_projects_what_is_not_rotated(width: int, block: int | None) -> None:
    layer, x = pack_layer(make_linear(width, 8, bits=2, rank=5, rotation_block=block)), tokens(9, width).double()
    rotated = Rotation(width, layer.signs, block).double()(x)
    expected = rotated @ layer.lowrank_b.double().T
    found = x @ folded(layer).double().T
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


def test_one_thread_launches_at_a_time() -> None:
    """A launch may compile, and CPython's parser is not safe in threads that parse at once."""
    with ThreadPoolExecutor(1) as other:
        with launching(torch.zeros(1)):
            assert not other.submit(compiling.acquire, blocking=False).result()
        assert other.submit(lambda: compiling.acquire(blocking=False) and compiling.release() is None).result()


def test_a_tensor_of_another_gpu_is_refused() -> None:
    tensor = SimpleNamespace(shape=(1,), dtype=torch.float32, device=torch.device("cuda", 0))
    with pytest.raises(ValueError, match="cuda:1"):
        checked(cast(torch.Tensor, tensor), "x", (1,), torch.device("cuda", 1), torch.float32)


def test_activations_are_bfloat16_unless_the_variable_says_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    with emulated(90):
        assert TritonBackend().activations is torch.bfloat16
        monkeypatch.setenv(ACTIVATIONS_VARIABLE, "float32")
        assert TritonBackend().activations is torch.float32
        monkeypatch.setenv(ACTIVATIONS_VARIABLE, "half")
        with pytest.raises(UserError, match=ACTIVATIONS_VARIABLE):
            TritonBackend()
