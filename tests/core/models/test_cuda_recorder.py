"""The recorder of CUDA graphs on a stand-in for CUDA that knows devices, streams and captures as torch does."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from robuq_core.models.graphs import CudaRecorder, GraphedDenoise


class Stream:
    def __init__(self, device: int) -> None:
        self.device, self.capture = device, None
        self.waited_for: list[Stream] = []

    def wait_stream(self, other: Stream) -> None:
        self.waited_for.append(other)


class Graph:
    def __init__(self) -> None:
        self.launches: list[tuple[int, Callable[[], None]]] = []

    def replay(self) -> None:
        for _, kernel in self.launches:
            kernel()


class Cuda:
    """Each thread has a current device, and on each device a current stream."""

    def __init__(self) -> None:
        self._local = threading.local()
        self._default = [Stream(0), Stream(1)]
        self._capture_stream: Stream | None = None
        self.capturing = 0
        self.most_capturing = 0
        self.pools = 0
        self.captures: list[tuple[Any, Stream]] = []  # pool and stream of each
        self.lose_launches = False

    @property
    def device_index(self) -> int:
        return getattr(self._local, "device", 0)

    def streams(self) -> list[Stream]:
        if not hasattr(self._local, "streams"):
            self._local.streams = list(self._default)
        return self._local.streams

    @contextlib.contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self._local.device = self.device_index, device.index
        yield
        self._local.device = before

    def make_stream(self, device: torch.device | None = None) -> Stream:
        return Stream(self.device_index if device is None else device.index)

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        device, before = self.device_index, self.streams()[stream.device]
        self._local.device, self.streams()[stream.device] = stream.device, stream
        yield
        self._local.device, self.streams()[stream.device] = device, before

    def current_stream(self) -> Stream:
        return self.streams()[self.device_index]

    def graph_pool_handle(self) -> int:
        self.pools += 1
        return self.pools

    @contextlib.contextmanager
    def graph(
        self, graph: Graph, pool: Any, stream: Stream | None = None, capture_error_mode: str = ""
    ) -> Iterator[None]:
        if stream is None:  # torch keeps one for the whole process, of the device that is current first
            self._capture_stream = stream = self._capture_stream or Stream(self.device_index)
        self.captures.append((pool, stream))
        self.capturing += 1
        self.most_capturing = max(self.most_capturing, self.capturing)
        with self.stream(stream):
            stream.capture = graph
            yield
            stream.capture = None
        self.capturing -= 1

    def launch(self, device: int, kernel: Callable[[], None]) -> None:
        """A kernel on the device of its tensors: recorded if that device's current stream is capturing, else run."""
        capture = self.streams()[device].capture
        if capture is None:
            kernel()
        elif not self.lose_launches:
            capture.launches.append((device, kernel))


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    fake = Cuda()
    for name in ("device", "stream", "current_stream", "graph", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    monkeypatch.setattr(torch.cuda, "Stream", fake.make_stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    return fake


def denoise_on(cuda: Cuda, device: int) -> GraphedDenoise[Tensor]:
    def denoise(x: Tensor, slots: Tensor, table: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        cuda.launch(device, lambda: out.copy_(x * 3 + device))
        return out

    return GraphedDenoise(denoise, CudaRecorder(torch.device("cuda", device)))


def test_each_device_records_its_own_kernels_on_its_own_stream(cuda: Cuda) -> None:
    slots, table = torch.zeros(2, dtype=torch.int64), torch.zeros(1)
    for device in (0, 1):
        graphed = denoise_on(cuda, device)
        for value in (1.0, 2.0):
            x = torch.full((2, 1, 1, 1), value)
            assert torch.equal(graphed(x, slots, table), x * 3 + device)
        graphed(x[:1], slots[:1], table)
        stream = cuda.captures[-1][1]
        assert stream.device == device
        assert stream.waited_for  # what was queued before it
    # All recordings of a device share its stream and its pool of memory.
    assert len(cuda.captures) == 4
    assert len({(pool, id(stream)) for pool, stream in cuda.captures}) == 2


def test_an_empty_recording_is_an_error(cuda: Cuda) -> None:
    cuda.lose_launches = True
    with pytest.raises(RuntimeError, match="cuda:1"):
        denoise_on(cuda, 1)(torch.ones(1, 1, 1, 1), torch.zeros(1, dtype=torch.int64), torch.zeros(1))


def test_one_thread_records_at_a_time(cuda: Cuda) -> None:
    started, release, running = threading.Event(), threading.Event(), []

    def first() -> Tensor:
        started.set()
        assert release.wait(60)
        out = torch.zeros(1)
        cuda.launch(0, lambda: out.fill_(5.0))
        return out

    def second() -> Tensor:
        running.append(release.is_set())
        out = torch.zeros(1)
        cuda.launch(1, lambda: out.fill_(6.0))
        return out

    threads = [
        threading.Thread(target=CudaRecorder(torch.device("cuda", i)), args=(run,))
        for i, run in enumerate((first, second))
    ]
    threads[0].start()
    assert started.wait(60)
    threads[1].start()
    release.set()
    for thread in threads:
        thread.join(60)
    assert running
    assert all(running)
    assert cuda.most_capturing == 1
