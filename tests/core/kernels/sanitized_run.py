"""Run by test_sanitizers.py in a process with the address sanitiser: LIBRARY ops|files|overflow."""

from __future__ import annotations

import random
import sys
import tempfile
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import torch
from crafted import with_tensor
from layer_cases import make_linear, prologues, tokens

from robuq_core.errors import UserError
from robuq_core.kernels import cpu, unpack

library = lru_cache(maxsize=1)(lambda: cpu.open_library(sys.argv[1]))
cpu.load_library = unpack.load_library = library  # type: ignore[assignment]

from checkpoint_mutations import mutated  # noqa: E402
from tiny import write_tiny  # noqa: E402

from robuq_core.config import QuantConfig  # noqa: E402
from robuq_core.kernels.ops import Block  # noqa: E402
from robuq_core.kernels.pack_layer import pack_layer  # noqa: E402
from robuq_core.pipeline import Sampler  # noqa: E402

FILES = 150


def backends() -> list[cpu.CpuBackend]:
    return [cpu.CpuBackend(2, path) for path, code in cpu._ISA_CODE.items() if library().robuq_supports(code)]


def ops() -> int:
    """Every op of every instruction set that this processor has, on odd shapes and on values beyond all bounds."""
    done = 0
    for backend in backends():
        for width, outputs, bits, rank, planes in (
            (4, 1, 2, 0, 1), (12, 5, 1, 1, 1), (36, 33, 3, 4, 1), (128, 130, 8, 3, 1), (256, 64, 2, 16, 2),
            (288, 7, 4, 2, 1),
        ):  # fmt: skip
            layer = pack_layer(make_linear(width, outputs, bits=bits, rank=rank, planes=planes))
            for rows in (1, 2, 31):
                for value in (1.0, 1e38, float("inf"), float("nan"), 0.0):
                    x = tokens(rows, width) * value
                    for prologue in prologues(rows, width):
                        backend.ternary_linear(backend.rotate_quantize(x, layer, prologue), layer)
                        backend.ternary(x, layer, prologue)
                        backend.add_ternary(torch.zeros(rows, outputs), torch.ones(1, outputs), x, layer, prologue)
                        done += 1
                    backend.linear(x, torch.ones(outputs, width), torch.ones(outputs))
        for width, hidden in ((4, 8), (36, 28), (96, 288)):
            shapes = ((width, 3 * width), (width, width), (width, hidden), (hidden, width))
            block = Block(*(pack_layer(make_linear(*shape, bits=2, rank=1)) for shape in shapes), 2, True, (1e-6, 1e-6))
            for images, length in ((1, 1), (3, 5)):
                for value in (1.0, 1e38, float("nan")):
                    x = tokens(images * length, width).reshape(images, length, width) * value
                    backend.add_block(x, torch.ones(6, images, width), block)
                    done += 1
        for images, length, width, heads in ((1, 1, 4, 1), (2, 17, 24, 3), (1, 65, 64, 1), (1, 130, 72, 1)):
            for value in (1.0, 1e38, float("inf"), float("nan"), 0.0):
                qkv = tokens(images * length, 3 * width).reshape(images, length, -1) * value
                for quantized in (True, False):
                    backend.attention(qkv, heads, quantized)
                    done += 1
    return done


def files() -> int:
    """Whole files, mutated ones and ones whose weights are as large as their types allow, read and run."""
    done = 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.safetensors"
        pick = random.Random(1)
        for quant in (QuantConfig(rank=4), QuantConfig(rank=0, weight_planes=3, grid="midtread"), QuantConfig(rank=1)):
            write_tiny(path, quant=quant)
            raw = path.read_bytes()
            names = [name for name in Sampler.from_checkpoint(path).header.tensors if not name.endswith("signs")]
            candidates = [raw, *(mutated(raw, pick) for _ in range(FILES))]
            candidates += [with_tensor(raw, name, largest) for name in pick.sample(names, 12)]
            for candidate in candidates:
                path.write_bytes(candidate)
                with suppress(UserError):
                    Sampler.from_checkpoint(path, threads=2).generate([0, 1], seed=0, steps=2)
                done += 1
    return done


def largest(tensor: torch.Tensor) -> None:
    if tensor.is_floating_point():
        tensor.fill_(torch.finfo(tensor.dtype).max)
    else:
        tensor.fill_(242)


def overflow() -> int:
    """A row more than there is room for: what a sanitiser must see."""
    packed = torch.zeros(1000, dtype=torch.uint8)
    room = torch.empty(4, 32, dtype=torch.uint8)
    return int(library().robuq_planar_from_base3(packed.data_ptr(), 8, 128, room.data_ptr()))


if __name__ == "__main__":
    print("done", {"ops": ops, "files": files, "overflow": overflow}[sys.argv[2]]())
