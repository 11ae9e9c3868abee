"""What the launches of a DiT-XL/2 block may take: registers, barriers, instructions, bytes, shared memory.

The launches are those of the network itself, compiled as Triton compiles them for a GPU, for GPUs that are not there. A
kernel that became slower fails here. ``budgets.json`` holds what each took when it was last accepted; after a change
that is meant: ``python tests/core/kernels/test_triton_budgets.py``.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
from layer_cases import make_linear, prologues, tokens
from ptx.driver import Launched, emulated

from robuq_core.bench.source import random_checkpoint
from robuq_core.config import ModelConfig, QuantConfig
from robuq_core.kernels.pack_layer import pack_layer
from robuq_core.kernels.triton.backend import TritonBackend
from robuq_core.kernels.triton.config import SHARED_LIMIT
from robuq_core.models.packed_dit import PackedDiT

BUDGETS = Path(__file__).with_name("budgets.json")
IMAGES = {80: (8,), 86: (8,), 89: (8,), 90: (1, 8), 100: (8,)}
# Other versions of Triton differ a little.
TOLERANCE = 1.1
REGISTERS, SHARED = 65536, 228 * 1024  # of an SM of 9.0
WAVEFRONTS = {(1152, None): 600, (4608, None): 2000, (4608, 128): 400}  # a token of a width, rotated by blocks


def tool(name: str, *arguments: str | Path) -> str:
    """What a tool that comes with Triton prints."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def registers_and_stack(launched: Launched) -> tuple[int, int]:
    """Per thread, registers and bytes; spilled registers lie in the stack."""
    found = re.search(r"REG:(\d+) STACK:(\d+)", tool("cuobjdump", "-res-usage", launched.kernel.cubin))
    assert found
    return int(found[1]), int(found[2])


def figures(launched: Launched) -> dict[str, int]:
    kernel = launched.kernel
    registers, stack = registers_and_stack(launched)
    sass = tool("nvdisasm", "-c", kernel.cubin)
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", sass, re.M)
    return {
        "registers": registers,
        "stack": stack,
        "threads": 32 * kernel.metadata.num_warps,
        "shared": kernel.metadata.shared,
        "barriers": sum(each.startswith("BAR.SYNC") for each in opcodes),
        "instructions": sum(not each.startswith("NOP") for each in opcodes),
        "integer products": sum(each.startswith(("IGMMA", "IMMA", "UTCIMMA")) for each in opcodes),
    }


def block(architecture: int, images: int) -> list[Launched]:
    """The launches of one block, in order."""
    config = ModelConfig(depth=1)
    found = random_checkpoint(config, QuantConfig())
    with emulated(architecture) as driver, torch.inference_mode():
        driver.only_compile = True
        network = PackedDiT(config, found.dense, found.layers, TritonBackend())
        x = torch.zeros(images, config.num_tokens, config.hidden_size)
        network.run_block(x, torch.zeros(6, images, config.hidden_size), network.blocks[0])
        return driver.compiled


def forward(architecture: int, narrow: bool) -> list[Launched]:
    """The launches of a forward with one block: as it is served; or in float32, of 1,024 tokens, rotated by 128."""
    config = ModelConfig(depth=1, input_size=32 if narrow else 64)
    found = random_checkpoint(config, QuantConfig(rotation_block=None if narrow else 128))
    with emulated(architecture) as driver, torch.inference_mode():
        driver.only_compile = True
        backend = TritonBackend(activations=torch.bfloat16 if narrow else torch.float32)
        x = torch.zeros(8, config.in_channels, config.input_size, config.input_size)
        PackedDiT(config, found.dense, found.layers, backend).forward(x, range(8), range(8))
        return driver.compiled


def measured(architecture: int) -> dict[str, dict[str, int]]:
    """By images, position in the block and kernel."""
    found = {}
    for images in IMAGES[architecture]:
        for i, launched in enumerate(block(architecture, images)):
            name = f"{images} images, launch {i}, {launched.kernel.metadata.name}"
            found[name] = {"bytes": launched.nbytes, **figures(launched)}
    return found


@pytest.mark.parametrize("architecture", list(IMAGES), ids="sm{}".format)
def test_no_launch_takes_more_than_it_did(architecture: int) -> None:
    """Products run on the tensor cores, and on 9.0 two programs share a multiprocessor."""
    found, budgets = measured(architecture), json.loads(BUDGETS.read_text())[f"sm_{architecture}"]
    assert list(found) == list(budgets)
    for name, each in found.items():
        assert each["stack"] == 0, name
        assert each["shared"] <= SHARED_LIMIT[architecture], name
        for kind in ("registers", "barriers", "instructions", "bytes", "shared"):
            assert each[kind] <= TOLERANCE * budgets[name][kind], (name, kind)
        assert each["integer products"] or "linear" not in name, name
        if architecture == 90 and name.endswith(("linear_kernel", "rotate_quantize_kernel")):
            assert 2 * each["registers"] * each["threads"] <= REGISTERS, name
            assert 2 * (each["shared"] + 1024) <= SHARED, name


@pytest.mark.parametrize("narrow", [True, False], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("architecture", list(IMAGES), ids="sm{}".format)
def test_nothing_spills_and_results_are_stored_16_bytes_at_a_time(architecture: int, narrow: bool) -> None:
    rounding = 0
    for each in forward(architecture, narrow):
        name, ptx = each.kernel.metadata.name, each.kernel.ptx.read_text()
        assert registers_and_stack(each)[1] == 0, name
        assert each.kernel.metadata.shared <= SHARED_LIMIT[architecture], name
        # To the nearest even, one value or two in one instruction.
        rounding += re.search(r"cvt\.rn\.bf16(x2)?\.f32", ptx) is not None
        if name in ("ternary_linear_kernel", "async_linear_kernel"):
            stores = re.findall(r"st\.global\S*", ptx)
            assert stores
            counter = "atom.global" in ptx  # of the parts of K that have arrived
            assert sum(".v4." not in store for store in stores) == counter, name
    assert rounding == (3 if narrow else 0)  # qkv, attention, fc1


@pytest.mark.parametrize(("width", "block"), list(WAVEFRONTS))
def test_a_rotation_passes_through_shared_memory_seldom(width: int, block: int | None) -> None:
    assert wavefronts(width, block) <= WAVEFRONTS[width, block]


def wavefronts(width: int, block: int | None) -> float:
    """A token on sm_90, without its low rank, which other programs of the launch compute."""
    layer, rows = pack_layer(make_linear(width, 17, bits=3, rotation_block=block)), 16
    with emulated(90) as driver:
        driver.statistics = Counter()
        TritonBackend().rotate_quantize(tokens(rows, width), layer, prologues(1, width)[3] if width == 1152 else None)
    return driver.statistics["wavefronts"] / rows


def _lines(launches: dict[str, dict[str, int]]) -> str:
    return ",\n".join(f" {json.dumps(name)}: {json.dumps(each)}" for name, each in launches.items())


def main(architectures: list[int]) -> None:
    """Measure these, or all, and keep the figures."""
    table: dict[str, Any] = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
    for architecture in architectures or IMAGES:
        table[f"sm_{architecture}"] = measured(architecture)
    parts = [f'"{name}": {{\n{_lines(launches)}\n}}' for name, launches in table.items()]
    BUDGETS.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    print(f"Triton {triton.__version__}; wavefronts a token: { {each: wavefronts(*each) for each in WAVEFRONTS} }")


if __name__ == "__main__":
    main(list(map(int, sys.argv[1:])))
