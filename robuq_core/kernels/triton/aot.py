"""Compile a kernel for a GPU that is not there, and read what it takes: registers, stack, shared memory.

Spilled registers live in a thread's stack frame: no stack, no spills.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from robuq_core.kernels.triton.config import LaunchConfig, compiling

# Shared memory a block may use, bytes, by compute capability (CUDA C programming guide, technical specifications).
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}


@dataclass(frozen=True)
class Compiled:
    """What a kernel takes on an architecture. ``registers`` a thread; ``stack`` and ``shared`` in bytes."""

    architecture: int
    registers: int
    stack: int
    shared: int
    ptx: str

    def tensor_instructions(self) -> set[str]:
        """Kinds of tensor-core instructions in the PTX, such as ``wgmma`` or ``mma.sync``."""
        return set(re.findall(r"\b(wgmma|mma\.sync|tcgen05\.mma)", self.ptx))


def compile_ahead(
    kernel: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    config: LaunchConfig,
    architecture: int,
    multiples_of_16: Collection[str] = (),
) -> Compiled:
    """Compile ``kernel`` for compute capability ``architecture`` (90 is 9.0). Pointers count as aligned to 16 bytes.

    Args:
        signature: Triton's type of each run-time argument, such as ``*fp32`` or ``i32``.
        constants: the compile-time arguments but for those of ``config``.
        multiples_of_16: integer arguments that are: a launch compiles for that, which is what widens stores.
    """
    gluon = kernel.is_gluon()
    fixed = {**constants, **config.blocks, **({"num_warps": config.num_warps} if gluon else {})}
    names = kernel.arg_names
    types = {name: "constexpr" if name in fixed else signature[name] for name in names}
    divisible = [name for name in names if types[name].startswith("*") or name in multiples_of_16]
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    options = {k: v for k, v in config.options().items() if k not in config.blocks}
    source = (GluonASTSource if gluon else ASTSource)(fn=kernel, signature=types, constexprs=fixed, attrs=aligned)
    with compiling:
        result = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    registers, stack = _resource_usage(result.asm["cubin"])
    return Compiled(architecture, registers, stack, result.metadata.shared, result.asm["ptx"])


def _resource_usage(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {text[:200]}")
    return int(found[1]), int(found[2])
