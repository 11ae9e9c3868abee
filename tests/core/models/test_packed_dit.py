"""One definition: the packed runtime and the fake-quantised training forward are the same network."""

from pathlib import Path

import pytest
import torch
from agreement import (
    Run,
    assert_floats_agree,
    assert_networks_agree,
    multiplies_bf16,
    relative_errors,
    run_packed,
    run_training,
)
from tiny import TINY, write_tiny
from torch import Tensor

from robuq_core.checkpoint import read_checkpoint
from robuq_core.config import ModelConfig, QuantConfig
from robuq_core.kernels.backends import select_backend
from robuq_core.kernels.ops import Block, NetworkBackend
from robuq_core.models.packed_dit import PackedDiT

BACKENDS = ["reference", "cpu"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("flavour", ["official", "diffusers"])
@pytest.mark.parametrize(
    ("bits", "grid", "planes"),
    [(2, "midrise", 1), (3, "midtread", 1), (8, "midrise", 1), (5, "midrise", 2), (8, "midrise", 3)],
)
def test_packed_forward_is_the_training_forward(
    tmp_path: Path, backend: str, flavour: str, bits: int, grid: str, planes: int
) -> None:
    path = tmp_path / "model.safetensors"
    config = TINY.model_copy(update={"flavour": flavour})
    quant = QuantConfig(activation_bits=bits, grid=grid, rank=4, weight_planes=planes)
    model = write_tiny(path, config, quant)
    with torch.no_grad():  # the file keeps embedders and final layer in fp16
        for name, parameter in model.named_parameters():
            if not name.startswith("blocks."):
                parameter.copy_(parameter.half().float())
    x = torch.randn(15, 3, 16, 16, generator=torch.Generator().manual_seed(bits))
    timesteps, classes = torch.tensor([0, 1, 250, 998, 999] * 3), torch.tensor([0, 3, 9, 10, 4] * 3)
    ours = select_backend(backend)
    packed = run_packed(config, read_checkpoint(path), ours, x, timesteps, classes)
    assert_networks_agree(packed, run_training(model, x, timesteps, classes), bits, multiplies_bf16(ours))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("flavour", ["sit", "repa"])
def test_the_flavours_of_a_flow_are_the_training_forward(tmp_path: Path, backend: str, flavour: str) -> None:
    config = TINY.model_copy(update={"flavour": flavour})
    runs = _both(tmp_path, backend, config, torch.tensor([0, 3.7, 250, 998.5, 1000] * 3))
    assert_networks_agree(*runs, 8, multiplies_bf16(select_backend(backend)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_512_px_is_the_training_forward(tmp_path: Path, backend: str) -> None:
    """Latents of 64 x 64 in patches of 2: 1,024 tokens."""
    config = TINY.model_copy(update={"input_size": 64, "patch_size": 2, "depth": 1, "num_classes": 3})
    assert config.num_tokens == 1024
    packed, trained = _both(tmp_path, backend, config, torch.tensor([3, 500, 990]))
    # Of so many codes a few tip over an edge in every image; each moves its own token.
    assert float(relative_errors(packed.output, trained.output).max()) < 0.02


def _both(folder: Path, backend: str, config: ModelConfig, timesteps: Tensor) -> tuple[Run, Run]:
    """``config`` packed and as in training, on one image a timestep."""
    path, rows = folder / "model.safetensors", len(timesteps)
    model = write_tiny(path, config, QuantConfig(activation_bits=8, rank=4))
    with torch.no_grad():  # the file keeps embedders and final layer in fp16
        for name, parameter in model.named_parameters():
            if not name.startswith("blocks."):
                parameter.copy_(parameter.half().float())
    x = torch.randn(rows, 3, config.input_size, config.input_size, generator=torch.Generator().manual_seed(1))
    classes = torch.arange(rows) % config.class_rows
    packed = run_packed(config, read_checkpoint(path), select_backend(backend), x, timesteps, classes)
    return packed, run_training(model, x, timesteps, classes)


@pytest.mark.parametrize("planes", [1, 2])
def test_blocks_in_one_call_are_their_ops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planes: int) -> None:
    path, backend = tmp_path / "model.safetensors", select_backend("cpu")
    if not isinstance(backend, NetworkBackend):
        pytest.skip("no native library")
    write_tiny(path, quant=QuantConfig(rank=4, weight_planes=planes))
    checkpoint = read_checkpoint(path)
    network = PackedDiT(TINY, checkpoint.dense, checkpoint.layers, backend)
    x, blocks, add_block = torch.randn(5, 3, 16, 16), [], backend.add_block

    def noted(tokens: Tensor, modulation: Tensor, block: Block) -> None:
        blocks.append(block)
        add_block(tokens, modulation, block)

    monkeypatch.setattr(backend, "add_block", noted)
    timesteps, classes = torch.tensor([0, 1, 250, 998, 999]), torch.tensor([0, 3, 9, 10, 4])
    with torch.inference_mode():
        output = network.forward(x, timesteps.tolist(), classes.tolist())
    apart = run_packed(TINY, checkpoint, backend, x, timesteps, classes).output
    assert_floats_agree(output, apart)  # the last norm is torch's in one of them
    assert len(blocks) == (TINY.depth if planes == 1 else 0)  # further planes go op by op


def test_a_student_trained_in_bf16_is_its_packed_file(tmp_path: Path) -> None:
    """At 8 bits: at 2, the rounding of bf16 products alone tips enough codes to move random weights by a fourth."""
    path = tmp_path / "model.safetensors"
    model = write_tiny(path, quant=QuantConfig(activation_bits=8, adaln_bits=8, rank=4))
    x = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(8))
    timesteps, classes = torch.linspace(0, 999, 8).long(), torch.arange(8)
    packed = run_packed(TINY, read_checkpoint(path), select_backend("reference"), x, timesteps, classes).output
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        trained = model(x, timesteps, classes).float()
    assert float(relative_errors(trained, packed).median()) < 0.06
    assert float((trained * packed).sum() / packed.square().sum()) == pytest.approx(1, abs=0.02)
