"""The native library under the address and undefined-behaviour sanitisers, on odd shapes and hostile checkpoints."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
NATIVE = ROOT / "robuq_core/kernels/native"
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, **options)  # type: ignore[call-overload, no-any-return]


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The library, built with sanitisers, and the environment of a process that can load it."""
    compiler = shlex.split(os.environ.get("CC", "")) or [name for name in [shutil.which("cc")] if name]
    if not compiler:
        pytest.skip("no C compiler to build the sanitised library with")
    if sys.platform != "linux":
        pytest.skip("the sanitisers' runtime is loaded first by LD_PRELOAD, which is Linux's")
    folder = tmp_path_factory.mktemp("sanitized")
    (folder / "probe.c").write_text("int probe(void) { return 0; }\n")
    shared = [*compiler, "-shared", "-fPIC", "-pthread", *SANITIZERS]
    probe = run([*shared, str(folder / "probe.c"), "-o", str(folder / "probe.so")])
    runtime = run([*compiler, "-print-file-name=libasan.so"]).stdout.strip()
    if probe.returncode or not Path(runtime).is_absolute():
        pytest.skip(f"{compiler[0]} has no address sanitiser to preload: {probe.stderr[:200]}")

    def compiled(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        flags = ["-std=gnu11", "-O1", "-g", "-ffp-contract=off", "-fPIC", "-pthread", "-Wno-psabi", *SANITIZERS]
        include = f"-I{sysconfig.get_path('include')}"
        done = run([*compiler, *flags, include, "-c", str(source), "-o", str(target)])
        assert done.returncode == 0, done.stderr
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = [str(path) for path in pool.map(compiled, sorted(NATIVE.glob("*.c")))]
    library = folder / "sanitized.so"
    done = run([*shared, *objects, "-lm", "-o", str(library)])
    assert done.returncode == 0, done.stderr
    environment = os.environ | {
        "LD_PRELOAD": runtime,
        # What Python and torch leave at their end is not the library's.
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(HERE)]),
        "PYTHONMALLOC": "malloc",
        "OMP_NUM_THREADS": "1",
    }
    return library, environment


def child(sanitized: tuple[Path, dict[str, str]], task: str) -> subprocess.CompletedProcess[str]:
    library, environment = sanitized
    return run([sys.executable, str(HERE / "sanitized_run.py"), str(library), task], env=environment)


def test_the_sanitiser_sees_an_overflow(sanitized: tuple[Path, dict[str, str]]) -> None:
    done = child(sanitized, "overflow")
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr


@pytest.mark.parametrize("task", ["ops", "files"])
def test_nothing_is_read_or_written_out_of_bounds(sanitized: tuple[Path, dict[str, str]], task: str) -> None:
    done = child(sanitized, task)
    assert done.returncode == 0, done.stderr[-6000:]
    assert "runtime error" not in done.stderr
    assert int(done.stdout.split()[-1]) > 100
