"""Instructions that the hot kernels execute: counted, not timed.

``python tests/core/kernels/instruction_counts.py`` writes ``instruction_counts.json`` anew, as far as this machine has
the tools; ``test_instruction_counts.py`` compares new counts with it. x86 code runs under callgrind, a tool of valgrind
that knows no AVX-512; AArch64 code under qemu-user with ``native_driver/count_plugin.c``. A count is of one more call
on one thread, so set-up is not in it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypedDict

import remote
from layer_cases import make_linear, tokens

from robuq_core.files import replacing
from robuq_core.kernels import cpu
from robuq_core.kernels.cpu import CpuBackend, Isa, NativeUnavailableError
from robuq_core.kernels.ops import Prologue
from robuq_core.kernels.pack_layer import pack_layer

STORED = Path(__file__).with_suffix(".json")
ISAS: tuple[Isa, ...] = ("avx2", "i8mm", "dotprod", "neon")
MOST = 1.05  # of a stored count
ROWS = 64
# Of DiT-XL/2: inputs, outputs, what comes in front.
LAYERS: Mapping[str, tuple[int, int, Prologue]] = {
    "qkv": (1152, 3456, None),
    "proj": (1152, 1152, None),
    "fc1": (1152, 4608, None),
    "fc2": (4608, 1152, "gelu"),
}


class Counts(TypedDict):
    compiler: str
    counts: dict[str, int]


def cases() -> dict[str, Callable[[CpuBackend], object]]:
    """By name, what to call: layers of 2 bits and rank 16 but for those that say otherwise."""
    found: dict[str, Callable[[CpuBackend], object]] = {}
    plain = CpuBackend(1, "plain")

    def add_product(name: str, inputs: int, outputs: int, bits: int, rows: int) -> None:
        layer = pack_layer(make_linear(inputs, outputs, bits=bits, rank=16))
        quantized = plain.rotate_quantize(tokens(rows, inputs), layer)
        found[f"product of {name}"] = lambda backend: backend.ternary_linear(quantized, layer)

    def add_rotation(name: str, inputs: int, prologue: Prologue) -> None:
        layer, x = pack_layer(make_linear(inputs, 32, bits=2, rank=16)), tokens(ROWS, inputs)
        found[f"rotation of {name}"] = lambda backend: backend.rotate_quantize(x, layer, prologue)

    for name, (inputs, outputs, prologue) in LAYERS.items():
        add_product(name, inputs, outputs, 2, ROWS)
        if name in ("proj", "fc2"):
            add_rotation(name, inputs, prologue)
    for bits in (4, 8):
        add_product(f"proj, {bits} bits", 1152, 1152, bits, ROWS)
    add_product("proj, 4 rows", 1152, 1152, 2, 4)
    qkv = tokens(256, 3 * 4 * 72).reshape(1, 256, -1)
    found["attention, 8 bits"] = lambda backend: backend.attention(qkv, 4, True)
    found["attention, float"] = lambda backend: backend.attention(qkv, 4, False)
    return found


def missing(isa: Isa) -> str | None:
    """Why counts of ``isa`` cannot be had here."""
    try:
        library = cpu.load_library()
    except NativeUnavailableError as error:
        return str(error)
    if isa == "avx2":
        if not library.robuq_supports(cpu._ISA_CODE[isa]):
            return "this processor has no AVX2"
        return remote.missing(("cc", "gcc"), ("valgrind", "valgrind"))
    return remote.missing(("cc", "gcc"), remote.ARM_COMPILER, remote.ARM_EMULATOR)


def compiler(isa: Isa) -> str:
    """Counts of another compiler, or version of it, are others."""
    return remote.run(["cc" if isa == "avx2" else remote.ARM_COMPILER[0], "--version"]).stdout.splitlines()[0]


def counting_driver(folder: Path, isa: Isa) -> list[str | Path]:
    """The command of a driver for ``isa`` that reports its instructions, built in ``folder``."""
    if isa == "avx2":
        tool = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={folder / 'callgrind'}"]
        return [*tool, remote.build(folder, "cc")]
    plugin = folder / "count.so"
    done = remote.run(["cc", "-shared", "-fPIC", "-O2", remote.DRIVER / "count_plugin.c", "-o", plugin])
    assert done.returncode == 0, done.stderr
    driver = remote.build(folder, remote.ARM_COMPILER[0])
    return [remote.ARM_EMULATOR[0], "-cpu", "max", "-plugin", plugin, driver]


def count(isa: Isa) -> dict[str, int]:
    """Instructions of each case on ``isa``."""
    with tempfile.TemporaryDirectory() as folder:
        driver = counting_driver(Path(folder), isa)
        return {name: _one_call(driver, isa, case) for name, case in cases().items()}


def _one_call(driver: Sequence[str | Path], isa: Isa, case: Callable[[CpuBackend], object]) -> int:
    local, totals = cpu.load_library, []
    for calls in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            library = remote.RemoteLibrary(driver, Path(folder))
            cpu.load_library = lambda library=library: library  # type: ignore[assignment, misc]
            try:
                backend = CpuBackend(1, isa)
                for _ in range(calls):
                    case(backend)
            finally:
                cpu.load_library = local
            totals.append(remote.collected(library.close()))
    return totals[1] - totals[0]


def stored() -> dict[str, Counts]:
    return json.loads(STORED.read_text())  # type: ignore[no-any-return]


def higher(counts: Mapping[str, int], before: Mapping[str, int]) -> list[str]:
    """The cases that take more than they may, and the cases that are not in both."""
    found = [
        f"{name}: {counts[name]:,} for {before[name]:,}" for name in before if counts.get(name, 0) > MOST * before[name]
    ]
    return found + [f"{name}: not in both" for name in sorted(counts.keys() ^ before.keys())]


def main() -> None:
    results = stored() if STORED.exists() else {}
    for isa in ISAS:
        if reason := missing(isa):
            print(f"{isa}: kept as it was: {reason}")
            continue
        results[isa] = {"compiler": compiler(isa), "counts": count(isa)}
        for name, number in results[isa]["counts"].items():
            print(f"{isa:8} {name:28} {number:>12,}")
    with replacing(STORED) as path:
        path.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
