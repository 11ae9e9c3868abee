"""Triton attention, the dense linear and the whole backend: in the interpreter against the reference, and compiled for
GPUs that are not there.

Triton reads ``TRITON_INTERPRET`` when kernels are defined: the interpreted tests run in a process of their own.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from interpreter import assert_passes_interpreted

pytest.importorskip("triton")

from robuq_core.kernels.triton import attention as kernels
from robuq_core.kernels.triton import dense_linear as dense

if os.environ.get("TRITON_INTERPRET") != "1":
    from robuq_core.kernels.triton.aot import SHARED_LIMIT, compile_ahead

    OTHERS = (80, 86, 89, 100)
    # On 10.0 the instruction depends on Triton's version.
    TENSOR_CORES = {80: {"mma.sync"}, 86: {"mma.sync"}, 89: {"mma.sync"}, 90: {"wgmma"}}

    def test_attention_and_backend_in_the_interpreter() -> None:
        assert_passes_interpreted(__file__)

    @pytest.mark.parametrize(
        ("head_dim", "architecture"),
        [(16, 90), (72, 90), (160, 90), *(pytest.param(72, sm, marks=pytest.mark.slow) for sm in OTHERS)],
    )
    def test_attention_compiles_without_spills(head_dim: int, architecture: int) -> None:
        fixed = kernels.constants(head_dim)
        limit = SHARED_LIMIT[architecture]
        first = compile_ahead(
            kernels.quantize_heads_kernel, kernels.SIGNATURE, fixed, kernels.quantize_config(head_dim), architecture
        )
        second = compile_ahead(
            kernels.attention_kernel, kernels.SIGNATURE, fixed, kernels.default_config(head_dim), architecture
        )
        for compiled in (first, second):
            assert compiled.stack == 0
            assert compiled.shared <= limit
        kinds = second.tensor_instructions()
        assert kinds == TENSOR_CORES.get(architecture, kinds)
        assert kinds

    @pytest.mark.parametrize("architecture", [90, *(pytest.param(sm, marks=pytest.mark.slow) for sm in OTHERS)])
    def test_dense_linear_compiles_to_plain_float32(architecture: int) -> None:
        compiled = compile_ahead(
            dense.dense_linear_kernel, dense.SIGNATURE, {"N": 32, "K": 1152}, dense.CONFIG, architecture
        )
        assert compiled.stack == 0
        assert compiled.shared <= SHARED_LIMIT[architecture]
        assert not compiled.tensor_instructions()
        assert "fma.rn.f32" in compiled.ptx

else:
    from agreement import (
        REFERENCE,
        Run,
        assert_attention_agrees,
        assert_networks_agree,
        relative_errors,
        run_packed,
    )
    from layer_cases import make_linear, tokens
    from tiny import TINY, write_tiny

    from robuq_core.checkpoint import read_checkpoint
    from robuq_core.config import QuantConfig
    from robuq_core.kernels.backends import select_backend
    from robuq_core.kernels.ops import Modulation
    from robuq_core.kernels.pack_layer import pack_layer
    from robuq_core.kernels.triton.backend import TritonBackend
    from robuq_core.kernels.triton.config import LaunchConfig

    TRITON = TritonBackend()

    @pytest.mark.parametrize(
        ("length", "heads", "head_dim"), [(1, 1, 1), (7, 3, 8), (67, 2, 72), (129, 1, 20), (300, 1, 72)]
    )
    @pytest.mark.parametrize("size", [0.3, 1.0, 4.0])
    def test_quantised_attention(length: int, heads: int, head_dim: int, size: float) -> None:
        qkv = size * tokens(2 * length, 3 * heads * head_dim).reshape(2, length, -1)
        assert_attention_agrees(qkv, heads, TRITON.attention(qkv, heads, True))

    @pytest.mark.parametrize("length", [777, 1024, 4096])
    def test_diffuse_heads_of_many_tokens(length: int) -> None:
        """Large tiles, since the interpreter takes them one after the other; values of one sign, for large sums."""
        qkv = torch.randn(1, length, 3, 32, generator=torch.Generator().manual_seed(length))
        qkv[:, :, 0] *= 0.3
        qkv[:, :, 2] = qkv[:, :, 2].abs()
        tiles = LaunchConfig({"BLOCK_M": 256, "BLOCK_N": 256}, 4, 1)
        assert_attention_agrees(qkv.flatten(2), 1, kernels.attention(qkv.flatten(2), 1, tiles))

    @pytest.mark.parametrize(("length", "heads", "head_dim"), [(5, 3, 8), (33, 2, 72)])
    def test_plain_attention(length: int, heads: int, head_dim: int) -> None:
        qkv = tokens(3 * length, 3 * heads * head_dim).reshape(3, length, -1)
        expected = REFERENCE.attention(qkv, heads, False)
        torch.testing.assert_close(TRITON.attention(qkv, heads, False), expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("quantized", [False, True])
    def test_a_picture_attends_as_if_alone(quantized: bool) -> None:
        qkv = tokens(3 * 35, 3 * 72).reshape(3, 35, -1)
        together = TRITON.attention(qkv, 2, quantized)
        for i in range(3):
            assert torch.equal(TRITON.attention(qkv[i : i + 1], 2, quantized)[0], together[i])

    def test_attention_of_zeros_and_of_nothing() -> None:
        assert not TRITON.attention(torch.zeros(1, 9, 36), 2, True).any()
        assert TRITON.attention(torch.zeros(0, 9, 36), 2, True).shape == (0, 9, 12)

    def test_attention_tells_heads_and_pictures_apart() -> None:
        """One-hot values and keys of one sharp match: each query reads its own key's value."""
        length, heads, head_dim = 6, 2, 8
        qkv = torch.zeros(2, length, 3, heads, head_dim)
        for i in range(length):
            qkv[:, i, :2, :, i] = 40.0
        qkv[:, :, 2] = torch.arange(2 * length * heads).reshape(2, length, heads, 1) / 24
        out = TRITON.attention(qkv.reshape(2, length, -1), heads, True)
        torch.testing.assert_close(out, qkv[:, :, 2].reshape(2, length, -1), rtol=0, atol=1 / 100)

    @pytest.mark.parametrize(("rows", "width", "outputs"), [(1, 1, 1), (5, 13, 7), (29, 77, 131), (50, 256, 64)])
    def test_linear(rows: int, width: int, outputs: int) -> None:
        x, weight, bias = tokens(rows, width), tokens(outputs, width, seed=1), torch.randn(outputs)
        exact = REFERENCE.linear(x.double(), weight.double(), bias.double())
        own = float((REFERENCE.linear(x, weight, bias) - exact).abs().max())
        y = TRITON.linear(x, weight, bias)
        assert float((y - exact).abs().max()) <= 2 * own + float(exact.abs().max()) * 2**-22
        # The interpreter multiplies with numpy, whose rounding depends on a row's place in the tile: places are kept.
        assert torch.equal(TRITON.linear(x[:1], weight, bias), y[:1])

    def test_wrong_shapes_are_refused_and_views_taken() -> None:
        layer, wide = pack_layer(make_linear(36, 8, bits=2)), tokens(4, 72)
        view = wide[:, ::2]
        assert torch.equal(TRITON.rotate_quantize(view, layer).codes, TRITON.rotate_quantize(view.clone(), layer).codes)
        with pytest.raises(ValueError, match=r"x must be torch.float32 or torch.bfloat16 \(4, 36\)"):
            TRITON.rotate_quantize(wide, layer)
        with pytest.raises(ValueError, match="3 rows do not divide among 2 images"):
            TRITON.rotate_quantize(tokens(3, 36), layer, Modulation(torch.zeros(2, 36), torch.zeros(2, 36), 1e-6))
        with pytest.raises(ValueError, match="5 heads"):
            TRITON.attention(torch.zeros(1, 2, 36), 5, True)
        with pytest.raises(ValueError, match="takes head_dim up to 256"):
            TRITON.attention(torch.zeros(1, 2, 3 * 257), 1, True)
        with pytest.raises(ValueError, match="'relu'"):
            TRITON.rotate_quantize(tokens(3, 36), layer, "relu")  # type: ignore[arg-type]

    @pytest.mark.parametrize(("bits", "grid"), [(2, "midrise"), (3, "midtread"), (8, "midrise")])
    def test_a_whole_network_is_the_references(tmp_path: Path, bits: int, grid: str) -> None:
        path = tmp_path / "model.safetensors"
        write_tiny(path, quant=QuantConfig(activation_bits=bits, grid=grid, rank=4))
        checkpoint = read_checkpoint(path)
        backend = select_backend("triton")
        assert backend.name == "triton-interpreted"
        x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(bits))
        timesteps, classes = torch.tensor([0, 250, 999]), torch.tensor([0, 10, 4])
        expected = run_packed(TINY, checkpoint, REFERENCE, x, timesteps, classes)
        result = run_packed(TINY, checkpoint, backend, x, timesteps, classes)
        assert_networks_agree(result, expected, bits)
        # numpy, which multiplies in the interpreter, adds in another order in a tile for fewer rows.
        alone = run_packed(TINY, checkpoint, backend, x[1:2], timesteps[1:2], classes[1:2])
        second = Run(result.output[1:2], [codes.reshape(3, -1, codes.shape[1])[1] for codes in result.codes])
        assert_networks_agree(alone, second, bits)

    def test_512_px_is_the_references(tmp_path: Path) -> None:
        """Latents of 64 x 64 in patches of 2: 1,024 tokens."""
        shape = {"input_size": 64, "patch_size": 2, "depth": 1, "num_heads": 1, "hidden_size": 16}
        config = TINY.model_copy(update=shape)
        write_tiny(tmp_path / "model.safetensors", config, QuantConfig(activation_bits=8, rank=4))
        checkpoint = read_checkpoint(tmp_path / "model.safetensors")
        x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
        timesteps, classes = torch.tensor([400]), torch.tensor([3])
        expected = run_packed(config, checkpoint, REFERENCE, x, timesteps, classes)
        result = run_packed(config, checkpoint, select_backend("triton"), x, timesteps, classes)
        assert float(relative_errors(result.output, expected.output).max()) < 0.02
