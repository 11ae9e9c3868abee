"""``GET /openapi.json``: FastAPI's document, with the bodies as the model that is served now takes them."""

from __future__ import annotations

import copy
from typing import Any

from fastapi import FastAPI

from server.api.intake import Intake
from server.api.kserve import INFER_SCHEMA

_KEYS = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "An API key."},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "The same key."},
}


def _header(name: str, text: str, **schema: Any) -> dict[str, Any]:
    return {
        "name": name,
        "in": "header",
        "description": text,
        "schema": {"type": "string", **schema},
    }


_REQUEST_HEADERS = [
    _header(
        "X-Request-Id",
        "Comes back in the answer and stands in the log.",
        pattern="^[A-Za-z0-9._:/+=-]*$",
        maxLength=128,
    ),
    # No pattern: W3C asks servers to ignore one that is malformed, not to refuse the request.
    _header("traceparent", "The caller's place in a W3C trace; the answer has traceresponse."),
]
_IDEMPOTENCY_KEY = _header(
    "Idempotency-Key",
    "The same key with the same body gets the same answer: while it is being drawn, and for some minutes after.",
    pattern="^[!-~]+$",
    minLength=1,
    maxLength=255,
)


def install_document(app: FastAPI, intake: Intake) -> None:
    """Let ``app`` describe the present model, also after a hot swap. Call it when all routes are there."""
    original = app.openapi
    made_of: Any = None
    document: dict[str, Any] = {}

    def openapi() -> dict[str, Any]:
        nonlocal made_of, document
        model = intake.model
        if made_of is not model:
            document = copy.deepcopy(original())
            for path, schema, headers in (
                ("/generate", model.schema, [_IDEMPOTENCY_KEY]),
                ("/v1/images/generations", model.openai_schema, [_IDEMPOTENCY_KEY]),
                ("/v2/models/{name}/infer", INFER_SCHEMA, []),
            ):
                schema = dict(schema)
                document["components"]["schemas"].update(schema.pop("$defs", {}))
                body = {"required": True, "content": {"application/json": {"schema": schema}}}
                route = document["paths"][path]["post"]
                route["requestBody"] = body
                route["parameters"] = [*route.get("parameters", ()), *headers, *_REQUEST_HEADERS]
            if intake.settings.api_keys_file is not None:
                document["components"]["securitySchemes"] = _KEYS
                document["security"] = [{name: []} for name in _KEYS]
            made_of = model
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # the documented way to replace it
