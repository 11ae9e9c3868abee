"""A forward recorded once for each number of rows and replayed with one launch (CUDA graphs).

A small batch on a GPU is bound by launches, not by work. Numbers of rows are rounded up to a bucket; the rows that fill
it up are computed and thrown away, which changes no other row's result.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
Outputs = TypeVar("Outputs", Tensor, Pair)
Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]
DenoiseKeeping = Callable[[Tensor, Tensor, Tensor], Pair]
# Takes what to record; gives how to replay it, and where its results then lie.
Record = Callable[[Callable[[], Outputs]], tuple[Callable[[], None], Outputs]]

_WARM_UP_RUNS = 2
_recording = threading.Lock()


def bucket(rows: int) -> int:
    """The size that ``rows`` (at least 1) are rounded up to: powers of two, and halfway between them from 8 on."""
    power = 1 << (rows - 1).bit_length()
    halfway = power // 4 * 3
    return halfway if power >= 16 and rows <= halfway else power


def buckets(max_rows: int) -> tuple[int, ...]:
    """Every size that up to ``max_rows`` rows are rounded up to, ascending."""
    return tuple(sorted({bucket(rows) for rows in range(1, max_rows + 1)}))


class CudaRecorder:
    """Records CUDA graphs on one device, on its own stream; they share a pool of memory and never run side by side.

    Without ``stream``, torch captures on a stream that it makes once per process, on whichever device is current then:
    recordings for another device would be empty.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = None
        self._pool: Any = None

    def __call__(self, run: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        """Raises RuntimeError if a replay leaves the outputs as they are."""
        # torch allows one capture at a time per process.
        with _recording, torch.cuda.device(self._device):
            if self._stream is None:
                self._stream, self._pool = torch.cuda.Stream(self._device), torch.cuda.graph_pool_handle()  # type: ignore[no-untyped-call]
            # Kernels are compiled before the recording, which must not wait for the device.
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for _ in range(_WARM_UP_RUNS):
                    run()
            graph = torch.cuda.CUDAGraph()
            # Other threads, other replicas' among them, may use CUDA meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                outputs = run()
            torch.cuda.current_stream().wait_stream(self._stream)
            self._check(graph.replay, (outputs,) if isinstance(outputs, Tensor) else outputs)
        return graph.replay, outputs

    def _check(self, replay: Callable[[], None], outputs: tuple[Tensor, ...]) -> None:
        untouched = [True] * len(outputs)
        for poison in (1.0, 2.0):  # a result may happen to be one of them, not both
            for output in outputs:
                output.fill_(poison)
            replay()
            untouched = [
                before and bool((output == poison).all()) for before, output in zip(untouched, outputs, strict=True)
            ]
        if any(output.numel() and same for output, same in zip(outputs, untouched, strict=True)):
            raise RuntimeError(
                f"the CUDA graph recorded on {self._device} is empty: a replay does not change its outputs"
            )


@dataclass(frozen=True)
class _Recording(Generic[Outputs]):
    x: Tensor
    slots: Tensor
    outputs: Outputs
    replay: Callable[[], None]


class GraphedDenoise(Generic[Outputs]):
    """``denoise(x [B, C, H, W], slots [B], table)`` by replaying recordings, one per bucket, made when first needed.

    The results lie in buffers that the next call overwrites. Recordings hold addresses: another ``table`` starts anew.
    """

    def __init__(self, denoise: Callable[[Tensor, Tensor, Tensor], Outputs], record: Record[Outputs]) -> None:
        self._denoise: Callable[[Tensor, Tensor, Tensor], Outputs] = denoise
        self._record: Record[Outputs] = record
        self._table: Tensor | None = None
        self._recordings: dict[int, _Recording[Outputs]] = {}

    def __call__(self, x: Tensor, slots: Tensor, table: Tensor) -> Outputs:
        rows = len(x)
        if table is not self._table:
            self._recordings, self._table = {}, table
        size = bucket(rows)
        if size not in self._recordings:
            self._recordings[size] = self._recorded(x, slots, table, size)
        recording = self._recordings[size]
        recording.x[:rows].copy_(x)
        recording.slots[:rows].copy_(slots)
        recording.replay()
        outputs = recording.outputs
        if isinstance(outputs, Tensor):
            return outputs[:rows]
        return outputs[0][:rows], outputs[1][:rows]

    def _recorded(self, x: Tensor, slots: Tensor, table: Tensor, size: int) -> _Recording[Outputs]:
        # Slot 0 stands for the rows that fill up: any entry will do.
        inputs, places = x.new_zeros(size, *x.shape[1:]), slots.new_zeros(size)
        replay, outputs = self._record(lambda: self._denoise(inputs, places, table))
        return _Recording(inputs, places, outputs, replay)
