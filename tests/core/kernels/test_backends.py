"""The choice of a backend, with and without the native library."""

from __future__ import annotations

import pytest
import torch

from robuq_core.errors import UserError
from robuq_core.kernels import backends, cpu
from robuq_core.kernels.backends import select_backend


def test_reference_is_always_there() -> None:
    assert select_backend("reference").name == "reference"


def test_an_unknown_name_lists_the_choices() -> None:
    with pytest.raises(ValueError, match="'cuda': choose one of auto, cpu, triton, reference"):
        select_backend("cuda")


def test_without_the_library_auto_is_the_reference_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cpu.load_library.cache_clear()
    monkeypatch.setattr(cpu.importlib.util, "find_spec", lambda name: None)
    try:
        assert select_backend().name == "reference"
        assert "not built" in caplog.text
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_triton_without_a_gpu_says_what_to_do() -> None:
    pytest.importorskip("triton")
    with pytest.raises(UserError, match=r"needs an NVIDIA GPU .*: choose backend cpu or auto"):
        select_backend("triton")
    with pytest.raises(UserError, match="does not run on cpu: choose device cuda, or backend cpu"):
        select_backend("triton", device="cpu")


def test_triton_that_is_not_installed_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install triton"):
        select_backend("triton")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "device", "expected"),
    [((9, 0), None, "triton"), ((8, 0), "cuda:1", "triton"), ((7, 5), "cuda", "reference"), ((9, 0), "cpu", "cpu")],
)
def test_auto_takes_triton_on_a_gpu_that_it_runs_on(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], device: str | None, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(backends, "_triton_backend", lambda device: "triton")
    monkeypatch.setattr(backends, "ReferenceBackend", lambda device="cpu": "reference")
    monkeypatch.setattr(backends, "CpuBackend", lambda threads: "cpu")
    assert select_backend(device=device) == expected
