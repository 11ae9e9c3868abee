"""Traces: the W3C ``traceparent`` header, and with the extra ``robuq[otel]`` OpenTelemetry spans of each HTTP request,
beneath it one of its generation."""

from __future__ import annotations

import asyncio
import re
import threading
from typing import TYPE_CHECKING, Any

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
_TRACEPARENT = re.compile(r"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")


def trace_id_of(traceparent: str) -> str:
    """The trace that a caller has begun; empty if the header is none by the W3C's rules."""
    match = _TRACEPARENT.fullmatch(traceparent.strip())
    return "" if match is None or (match[1] == "00" and match[3]) else match[2]


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
        self._error = trace.StatusCode.ERROR

    def instrument(self, app: FastAPI) -> None:
        self._instrumentor.instrument_app(
            app, tracer_provider=self._provider, excluded_urls=_EXCLUDED, exclude_spans=["receive", "send"]
        )

    def follow(self, request: Request) -> None:
        """Record ``request`` as a child of the HTTP request that brought it."""
        fields = vars(request.specs[0]) | {
            "model": request.model.name,
            "class_id": -1 if request.class_id is None else request.class_id,
            "seed": request.seed,
            "format": request.image_format,
            **{name: getattr(request, name) for name in ("num_images", "priority", "request_id")},
        }
        span = self._tracer.start_span("generation", attributes=_named(fields))

        def ended(outcome: asyncio.Future[Any]) -> None:
            error = asyncio.CancelledError() if outcome.cancelled() else outcome.exception()
            if error is not None:
                span.set_attribute("error.type", type(error).__name__)
                span.set_status(self._error, str(error))
            else:
                span.set_attributes(_named(vars(outcome.result().timings)))
            span.end()

        request.future.add_done_callback(ended)

    def shutdown(self) -> None:
        """Send what is left, for a bounded time."""
        # The provider's own bound is half a minute, more than a stop may take.
        thread = threading.Thread(target=self._provider.shutdown, name="telemetry", daemon=True)
        thread.start()
        thread.join(SHUTDOWN_S)


def _named(fields: dict[str, Any]) -> dict[str, Any]:
    return {f"robuq.{name}": value for name, value in fields.items()}
