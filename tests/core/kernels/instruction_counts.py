"""Instructions that the hot kernels execute, counted, not timed: ``python tests/core/kernels/instruction_counts.py``
writes ``instruction_counts.json``, which ``test_instruction_counts.py`` compares with new counts.

x86 code runs under ``valgrind --tool=callgrind``, which knows no AVX-512; AArch64 code under qemu-user with
``native_driver/count_plugin.c``. A count is of one call more on one thread, so start and set-up are not in it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import remote
from layer_cases import make_linear, tokens

from robuq_core.kernels import cpu
from robuq_core.kernels.ops import Prologue
from robuq_core.kernels.pack_layer import pack_layer

STORED = Path(__file__).with_suffix(".json")
ROWS = 64
# Of DiT-XL/2: inputs, outputs, what comes in front.
LAYERS: dict[str, tuple[int, int, Prologue]] = {
    "qkv": (1152, 3456, None),
    "proj": (1152, 1152, None),
    "fc1": (1152, 4608, None),
    "fc2": (4608, 1152, "gelu"),
}


def cases() -> dict[str, Callable[[cpu.CpuBackend], object]]:
    """By name, what to call. Products at 2 bits, and at 4 and 8 of one layer; one of 4 rows."""
    found: dict[str, Callable[[cpu.CpuBackend], object]] = {}

    def add(name: str, inputs: int, outputs: int, prologue: Prologue, bits: int, rows: int) -> None:
        layer, x = pack_layer(make_linear(inputs, outputs, bits=bits, rank=16)), tokens(rows, inputs)
        quantized = cpu.CpuBackend(1, "plain").rotate_quantize(x, layer, prologue)
        found[f"product {name}"] = lambda backend: backend.ternary_linear(quantized, layer)
        if bits == 2 and rows == ROWS:
            found[f"rotation {name}"] = lambda backend: backend.rotate_quantize(x, layer, prologue)

    for name, (inputs, outputs, prologue) in LAYERS.items():
        add(name, inputs, outputs, prologue, 2, ROWS)
    for bits in (4, 8):
        add(f"proj, {bits} bits", 1152, 1152, None, bits, ROWS)
    add("proj, 4 rows", 1152, 1152, None, 2, 4)
    qkv = tokens(256, 3 * 4 * 72).reshape(1, 256, -1)
    found["attention, 8 bits, 4 heads"] = lambda backend: backend.attention(qkv, 4, True)
    found["attention, float, 4 heads"] = lambda backend: backend.attention(qkv, 4, False)
    return found


def count(command: Sequence[str | Path], isa: cpu.Isa, wanted: Sequence[str] | None = None) -> dict[str, int]:
    """Instructions of each case on ``isa``, by the driver that ``command`` runs and counts."""
    local, totals = cpu.load_library, {}
    for name, case in cases().items():
        if wanted is not None and name not in wanted:
            continue
        ends = []
        for calls in (1, 2):
            with tempfile.TemporaryDirectory() as folder:
                library = remote.RemoteLibrary(command, Path(folder))
                cpu.load_library = lambda library=library: library  # type: ignore[assignment, misc]
                try:
                    backend = cpu.CpuBackend(1, isa)
                    for _ in range(calls):
                        case(backend)
                    del backend
                finally:
                    cpu.load_library = local
                ends.append(remote.collected(library.close()))
        totals[name] = ends[1] - ends[0]
    return totals
