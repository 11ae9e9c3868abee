"""One definition: the packed runtime and the fake-quantised training forward are the same network."""

from pathlib import Path

import pytest
import torch
from tiny import TINY, write_tiny

from robuq_core.checkpoint import read_checkpoint
from robuq_core.config import QuantConfig
from robuq_core.kernels.backends import select_backend
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
    checkpoint = read_checkpoint(path)
    packed = PackedDiT(config, checkpoint.dense, checkpoint.layers, select_backend(backend))
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(5, 3, 16, 16, generator=generator)
    timesteps, classes = torch.tensor([0, 1, 250, 998, 999]), torch.tensor([0, 3, 9, 10, 4])
    with torch.inference_mode():
        expected, result = model(x, timesteps, classes), packed.forward(x, timesteps, classes)
    # Sums in another order can tip a value over the edge of its cell and so move its token by a step: most
    # images agree to rounding, none is off by more than a few such steps.
    errors = (result - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert float(errors.median()) < 2e-3
    assert float(errors.max()) < 0.03
