"""The choice of a backend, with and without the native library."""

from __future__ import annotations

import pytest

from robuq_core.kernels import cpu
from robuq_core.kernels.select import select_backend


def test_reference_is_always_there() -> None:
    assert select_backend("reference").name == "reference"


def test_an_unknown_name_lists_the_choices() -> None:
    with pytest.raises(ValueError, match="'cuda': choose one of auto, cpu, reference"):
        select_backend("cuda")


def test_without_the_library_auto_is_the_reference_and_cpu_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu.load_library.cache_clear()
    monkeypatch.setattr(cpu.importlib.util, "find_spec", lambda name: None)
    try:
        assert select_backend().name == "reference"
        with pytest.raises(cpu.NativeUnavailableError, match="install a C compiler"):
            select_backend("cpu")
    finally:
        cpu.load_library.cache_clear()


def test_auto_is_native_where_it_is_built() -> None:
    try:
        cpu.load_library()
    except cpu.NativeUnavailableError as error:
        pytest.skip(str(error))
    backend = select_backend("auto", threads=1)
    assert isinstance(backend, cpu.CpuBackend)
    assert backend.threads == 1
