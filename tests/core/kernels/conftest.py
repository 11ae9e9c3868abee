"""The Triton backend, its kernels compiled for a GPU and executed in the emulator of ``tests/ptx``. Any race or stray
access fails the test that launched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch


@pytest.fixture(scope="module", params=[80, 90], ids="sm{}".format)
def gpu(request: pytest.FixtureRequest) -> Iterator[Any]:
    from ptx.driver import emulated

    with emulated(request.param) as driver:
        yield driver


def _backend(dtype: torch.dtype) -> Any:
    from robuq_core.kernels.triton.backend import TritonBackend

    return TritonBackend(activations=dtype)


@pytest.fixture
def wide(gpu: Any) -> Any:
    return _backend(torch.float32)


@pytest.fixture
def narrow(gpu: Any) -> Any:
    return _backend(torch.bfloat16)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["wide", "narrow"])
def ops(gpu: Any, request: pytest.FixtureRequest) -> Any:
    return _backend(request.param)
