"""Prometheus metrics, prefix ``robuq_``: seconds, bytes, ``_total`` for counters."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

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

import robuq_core

LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300)


def _batch_buckets(max_batch_rows: int) -> list[int]:
    """1, 2, 4 .. and the largest batch itself."""
    powers = [2**i for i in range(max_batch_rows.bit_length())]
    return sorted({*powers, max_batch_rows})


class Metrics:
    """All series of one server, in a registry of its own. The engine observes; gauges are read on scrape."""

    def __init__(self, max_batch_rows: int) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series beside each counter that nobody asked for
        self.registry = registry = CollectorRegistry()

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(f"robuq_{name}", text, buckets=LATENCY_BUCKETS, registry=registry)

        self.requests = Counter(
            "robuq_requests_total", "Requests that left the engine.", ["finished_reason"], registry=registry
        )
        self.rejected = Counter("robuq_rejected_total", "Requests that it did not take.", ["reason"], registry=registry)
        self.images = Counter("robuq_images_total", "Images delivered by finished requests.", registry=registry)
        self.engine_steps = Counter("robuq_engine_steps_total", "Forwards of the model.", registry=registry)
        self.e2e_latency = histogram("e2e_request_latency_seconds", "From acceptance to the last encoded image.")
        self.queue_time = histogram("request_queue_time_seconds", "From acceptance to the first step.")
        self.inference_time = histogram("request_inference_time_seconds", "From the first step to the last.")
        self.time_to_first_step = histogram("time_to_first_step_seconds", "From acceptance to the first step's end.")
        self.step_duration = histogram("step_duration_seconds", "One forward and the update of its rows.")
        self.decode_duration = histogram("decode_duration_seconds", "Decoding and encoding one image.")
        self.batch_rows = Histogram(
            "robuq_batch_rows",
            "Rows of the model that one forward takes through its blocks; an image with guidance takes two.",
            buckets=_batch_buckets(max_batch_rows),
            registry=registry,
        )
        self._weight_bytes = Gauge(
            "robuq_model_weight_bytes", "Bytes of the network's weights in memory.", registry=registry
        )
        self._decoder_weight_bytes = Gauge(
            "robuq_decoder_weight_bytes", "Bytes of the latent decoder's; 0 where pixels are drawn.", registry=registry
        )
        self._info = Info("robuq", "The server and its model.", registry=registry)
        memory = Gauge("robuq_process_resident_memory_bytes", "Resident memory of the server.", registry=registry)
        process = psutil.Process()

        def resident() -> float:
            try:
                return float(process.memory_info().rss)
            except OSError:  # too many open files: the other series are needed now
                return math.nan

        memory.set_function(resident)

    def observe_step(self, rows: int, seconds: float) -> None:
        """One forward for requests, ``rows`` rows of the model going through its blocks; a warm-up's do not count."""
        self.engine_steps.inc()
        self.step_duration.observe(seconds)
        self.batch_rows.observe(rows)

    def describe_model(
        self,
        *,
        checkpoint: str,
        backend: str,
        average_activation_bits: float,
        weight_bytes: int,
        decoder: str,
        decoder_weight_bytes: int,
    ) -> None:
        """Set what does not change while a checkpoint is served; called again when another one is."""
        self._weight_bytes.set(weight_bytes)
        self._decoder_weight_bytes.set(decoder_weight_bytes)
        self._info.info(
            {
                "version": robuq_core.__version__,
                "checkpoint": checkpoint,
                "backend": backend,
                "decoder": decoder,
                "avg_activation_bits": f"{average_activation_bits:g}",
            }
        )

    def watch_requests(self, *, running: Callable[[], float], waiting: Callable[[], float]) -> None:
        """Read the gauges of requests in flight from their owner, so that they cannot drift."""
        gauge = Gauge("robuq_requests_running", "Requests with at least one image under way.", registry=self.registry)
        gauge.set_function(running)
        gauge = Gauge("robuq_requests_waiting", "Requests none of whose images has begun.", registry=self.registry)
        gauge.set_function(waiting)

    def watch_ready(self, ready: Callable[[], float]) -> None:
        """Tell Prometheus what /ready tells a load balancer, which alone can see it else."""
        gauge = Gauge("robuq_ready", "1 while requests are taken, else 0.", registry=self.registry)
        gauge.set_function(ready)

    def watch_keys(self, unreadable_s: Callable[[], float]) -> None:
        """For how long revocations could not be noticed."""
        gauge = Gauge(
            "robuq_api_keys_unreadable_seconds",
            "Seconds for which the file of API keys could not be read, else 0.",
            registry=self.registry,
        )
        gauge.set_function(unreadable_s)

    def watch_gpu_memory(
        self, gpus: int, *, used: Callable[[int], float], reserved: Callable[[int], float], peak: Callable[[int], float]
    ) -> None:
        """Bytes of the GPUs 0..``gpus`` - 1, read on scrape."""
        for name, text, read in (
            ("used", "Memory of the GPU that tensors take.", used),
            ("reserved", "Memory of the GPU that the allocator holds.", reserved),
            ("peak", "Most memory of the GPU that tensors have taken.", peak),
        ):
            gauge = Gauge(f"robuq_gpu_memory_{name}_bytes", text, ["gpu"], registry=self.registry)
            for gpu in range(gpus):
                gauge.labels(str(gpu)).set_function(partial(read, gpu))

    def render(self) -> bytes:
        """The text exposition of every series."""
        return generate_latest(self.registry)
