"""The native library built with its AVX-512 and AMX files on emulated instructions: same source, any processor."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NATIVE = HERE.parents[2] / "robuq_core/kernels/native"
HEADERS = HERE / "native_emulation"


def build(folder: Path) -> Path:
    """The library, compiled into ``folder``; skips the test where it cannot be."""
    compiler = shlex.split(os.environ.get("CC", "")) or [name for name in [shutil.which("cc")] if name]
    if not compiler:
        pytest.skip("no C compiler to build the emulated instruction sets with")
    # -O1: the emulation inlines so much that more would take a minute to compile.
    flags = ["-std=gnu11", "-O1", "-ffp-contract=off", "-fPIC", "-pthread", "-Wno-psabi", "-DROBUQ_SIMDE"]
    flags += [f"-I{HEADERS}", f"-I{sysconfig.get_path('include')}"]
    if _run([*compiler, *flags, "-x", "c", "-include", "simde/x86/avx512.h", "-E", os.devnull]).returncode:
        pytest.skip("SIMDe's headers are not installed (Debian: libsimde-dev): AVX-512 and AMX cannot be emulated")

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        done = _run([*compiler, *flags, "-c", str(source), "-o", str(target)])
        assert done.returncode == 0, done.stderr
        return target

    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(compile_one, sorted(NATIVE.glob("*.c"))))
    library = folder / "emulated.so"
    done = _run([*compiler, "-shared", "-pthread", *map(str, objects), "-lm", "-o", str(library)])
    assert done.returncode == 0, done.stderr
    return library


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
