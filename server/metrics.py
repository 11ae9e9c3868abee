"""Prometheus metrics, prefix ``robuq_``: seconds, bytes, ``_total`` for counters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

import psutil
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

import robuq_core
from server.request import ModelInfo

LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300)


GAUGES = {
    "process_resident_memory_bytes": "Resident memory of the HTTP process.",
    "requests_running": "Requests with at least one image in progress.",
    "requests_waiting": "Requests none of whose images has begun.",
    "cache_bytes": "Bytes of images kept for equal requests.",
    "ready": "1 while requests are accepted, else 0.",
    "api_keys_unreadable_seconds": "Seconds for which the file of API keys could not be read, else 0.",
}


_GPU_SERIES = {
    "used": "Memory of the GPU that tensors take.",
    "reserved": "Memory of the GPU that the allocator holds.",
    "peak": "Peak memory of the GPU that tensors have taken.",
}


class Worker(Protocol):
    """What is read of a :class:`server.remote_worker.RemoteWorker`; ``gpu_memory`` has the order of the series."""

    number: int
    handle: Any
    gpu_memory: list[int] | None


def _resident(process: psutil.Process) -> float:
    try:
        return float(process.memory_info().rss)
    except (OSError, psutil.Error):  # too many open files, or it has just ended: the other series are needed now
        return math.nan


class _WorkerCollector(Collector):
    def __init__(self, workers: Callable[[], Sequence[Worker]]) -> None:
        self._workers = workers

    def collect(self) -> Iterable[Metric]:
        found = self._workers()
        yield GaugeMetricFamily("robuq_workers_ready", "Workers that take images.", value=len(found))
        resident = GaugeMetricFamily(
            "robuq_worker_resident_memory_bytes",
            "Resident memory of a worker; weights that workers share count in each.",
            labels=["worker"],
        )
        for worker in found:
            with suppress(psutil.Error, OSError):
                resident.add_metric([str(worker.number)], _resident(psutil.Process(worker.handle.pid)))
        yield resident
        on_gpu = {str(worker.number): worker.gpu_memory for worker in found if worker.gpu_memory is not None}
        for i, (name, text) in enumerate(_GPU_SERIES.items() if on_gpu else ()):
            family = GaugeMetricFamily(f"robuq_gpu_memory_{name}_bytes", text, labels=["gpu"])
            for number, memory in on_gpu.items():
                family.add_metric([number], float(memory[i]))
            yield family


class Metrics:
    """All series of one server, in a registry of its own. The engine observes; gauges are read on scrape."""

    def __init__(self, max_batch_rows: int) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # else each counter has a second series
        self.registry = registry = CollectorRegistry()

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(f"robuq_{name}", text, buckets=LATENCY_BUCKETS, registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"robuq_{name}", text, labels, registry=registry)

        self.requests = counter("requests_total", "Requests that ended.", "finished_reason")
        self.rejected = counter("rejected_total", "Requests rejected before queueing, by reason.", "reason")
        self.cache_requests = counter(
            "cache_requests_total",
            "Requests with a chosen seed: hit (images were in memory), shared (generated for an equal request), miss.",
            "outcome",
        )
        self.images = counter("images_total", "Images delivered by finished requests.")
        self.engine_steps = counter("engine_steps_total", "Forwards of the model.")
        self.worker_deaths = counter(
            "worker_deaths_total",
            "Workers that died: killed by a signal, exited, hung and were killed, failed to run the model.",
            "reason",
        )
        self.e2e_latency = histogram("e2e_request_latency_seconds", "From acceptance to the last encoded image.")
        self.queue_time = histogram("request_queue_time_seconds", "From acceptance to the first step.")
        self.inference_time = histogram("request_inference_time_seconds", "From the first step to the last.")
        self.time_to_first_step = histogram("time_to_first_step_seconds", "From acceptance to the first step's end.")
        self.step_duration = histogram("step_duration_seconds", "One forward and the update of its rows.")
        self.decode_duration = histogram("decode_duration_seconds", "Decoding and encoding one image.")
        self.batch_rows = Histogram(
            "robuq_batch_rows",
            "Rows of the model that one forward takes through its blocks; an image with guidance takes two.",
            buckets=sorted({*(2**i for i in range(max_batch_rows.bit_length())), max_batch_rows}),
            registry=registry,
        )
        gauge = partial(Gauge, registry=registry)
        self._weight_bytes = gauge("robuq_model_weight_bytes", "Bytes of the network's weights in memory.")
        self._decoder_weight_bytes = gauge(
            "robuq_decoder_weight_bytes", "Bytes of the latent decoder's weights; 0 for models of pixels."
        )
        self._info = Info("robuq", "The server and its model.", registry=registry)
        self.watch("process_resident_memory_bytes", partial(_resident, psutil.Process()))

    def observe_step(self, rows: int, seconds: float) -> None:
        """One forward for requests, ``rows`` rows of the model going through its blocks; a warm-up's do not count."""
        self.engine_steps.inc()
        self.step_duration.observe(seconds)
        self.batch_rows.observe(rows)

    def describe_model(self, model: ModelInfo) -> None:
        """Set what does not change while a checkpoint is served; called again when another one is."""
        self._weight_bytes.set(model.weight_bytes)
        self._decoder_weight_bytes.set(model.decoder_weight_bytes)
        self._info.info(
            {
                "version": robuq_core.__version__,
                "checkpoint": model.name,
                "backend": model.backend_name,
                "decoder": model.decoder_name,
                "avg_activation_bits": f"{model.average_activation_bits:g}",
            }
        )

    def watch(self, name: str, read: Callable[[], float]) -> None:
        """Read a gauge of :data:`GAUGES` from its owner on scrape, so that it cannot drift."""
        Gauge(f"robuq_{name}", GAUGES[name], registry=self.registry).set_function(read)

    def watch_workers(self, workers: Callable[[], Sequence[Worker]]) -> None:
        """Memory and number of the workers that take images, read on scrape."""
        self.registry.register(_WorkerCollector(workers))

    def render(self) -> bytes:
        return generate_latest(self.registry)
