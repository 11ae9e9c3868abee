"""Traces: the W3C ``traceparent`` header, and with the extra ``robuq[otel]`` OpenTelemetry spans of each HTTP request,
beneath it one of its generation with queue, inference and decoding."""

from __future__ import annotations

import asyncio
import random
import re
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from fastapi import FastAPI

import robuq_core
from robuq_core.errors import UserError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

    from server.request import Request

# A collector that does not answer may hold the end of the process for so long.
SHUTDOWN_S = 3.0
# Probes, scrapes and the page's polling would drown what matters.
_EXCLUDED = "/health$,/ready$,/metrics$,/queue$,/web/"

# version, trace id, parent id, flags; versions after 00 may add fields.
_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


class TraceContext(NamedTuple):
    """Where in a trace a request stands: ids in lower-case hexadecimal, ``span_id`` being this server's own."""

    trace_id: str
    span_id: str
    sampled: bool

    @property
    def traceresponse(self) -> str:
        """The header of the answer, by which a caller finds this server's part of the trace."""
        return f"00-{self.trace_id}-{self.span_id}-{self.sampled:02x}"


def from_traceparent(header: str) -> TraceContext | None:
    """The trace that a caller has begun, or None if the header is none by the W3C's rules."""
    match = _TRACEPARENT.fullmatch(header.strip())
    if match is None:
        return None
    version, trace_id, parent_id, _, more = match.groups()
    if version == "ff" or (version == "00" and more) or not int(trace_id, 16) or not int(parent_id, 16):
        return None
    # Nothing is recorded here, so the answer says "not sampled", whatever the caller does on its side.
    return TraceContext(trace_id, f"{random.getrandbits(64) or 1:016x}", False)


def otlp_exporter(endpoint: str) -> SpanExporter:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter(endpoint=endpoint.rstrip("/") + "/v1/traces")


class Telemetry:
    """Records spans to ``endpoint``. Its provider is its own: nothing global is touched.

    Raises:
        UserError: the extra is not installed.
    """

    def __init__(self, endpoint: str) -> None:
        try:
            from opentelemetry import trace
            from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor

            exporter = otlp_exporter(endpoint)
        except ImportError as error:
            raise UserError(
                f"--otel-endpoint (or ROBUQ_OTEL_ENDPOINT) needs {error.name or 'OpenTelemetry'}; "
                "from a checkout: pip install '.[otel]'"
            ) from error
        resource = Resource.create({"service.name": "robuq", "service.version": robuq_core.__version__})
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("robuq", robuq_core.__version__)
        self._instrumentor = FastAPIInstrumentor
        self._trace = trace

    def instrument(self, app: FastAPI) -> None:
        self._instrumentor.instrument_app(
            app, tracer_provider=self._provider, excluded_urls=_EXCLUDED, exclude_spans=["receive", "send"]
        )

    def current(self) -> TraceContext | None:
        context = self._trace.get_current_span().get_span_context()
        if not context.is_valid:
            return None
        return TraceContext(f"{context.trace_id:032x}", f"{context.span_id:016x}", context.trace_flags.sampled)

    def follow(self, request: Request) -> None:
        """Record ``request`` as a child of the HTTP request that brought it."""
        began = time.time_ns()
        fields = vars(request.specs[0]) | {
            "model": request.model.name,
            "class_id": -1 if request.class_id is None else request.class_id,
            "seed": request.seed,
            "format": request.image_format,
            **{name: getattr(request, name) for name in ("num_images", "priority", "request_id")},
        }
        attributes = {f"robuq.{name}": value for name, value in fields.items()}
        span = self._tracer.start_span("generation", start_time=began, attributes=attributes)
        request.future.add_done_callback(lambda outcome: self._ended(span, began, outcome))

    def _ended(self, span: Any, began: int, outcome: asyncio.Future[Any]) -> None:
        error: BaseException | None = asyncio.CancelledError() if outcome.cancelled() else outcome.exception()
        if error is not None:
            span.set_attribute("error.type", type(error).__name__)
            span.set_status(self._trace.Status(self._trace.StatusCode.ERROR, str(error)))
            span.end()
            return
        timings = outcome.result().timings
        parent = self._trace.set_span_in_context(span)
        start = began
        for name in ("queue", "inference", "decode"):
            part = self._tracer.start_span(name, context=parent, start_time=start)
            start += round(getattr(timings, f"{name}_s") * 1e9)
            part.end(start)
        span.end(start)

    def shutdown(self) -> None:
        """Send what is left, for a bounded time."""
        # The provider's own bound is half a minute, more than a stop may take.
        thread = threading.Thread(target=self._provider.shutdown, name="telemetry", daemon=True)
        thread.start()
        thread.join(SHUTDOWN_S)
