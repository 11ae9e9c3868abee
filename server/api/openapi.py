"""``GET /openapi.json``: FastAPI's document, with the bodies as the model that is served now takes them."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from server.api.intake import Intake

_KEYS = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "An API key."},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "The same key."},
}


def install_document(app: FastAPI, intake: Intake) -> None:
    """Let ``app`` describe the present model, also after a hot swap. Call it when all routes are there."""
    original = app.openapi
    made_of: Any = None
    document: dict[str, Any] = {}

    def openapi() -> dict[str, Any]:
        nonlocal made_of, document
        model = intake.model
        if made_of is not model:
            document = dict(original())
            document["paths"] = dict(document["paths"])
            _set_body(document["paths"], "/generate", model.schema)
            _set_body(document["paths"], "/v1/images/generations", model.openai_schema)
            if intake.settings.api_keys_file is not None:
                document["components"] = document["components"] | {"securitySchemes": _KEYS}
                document["security"] = [{name: []} for name in _KEYS]
            made_of = model
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # the documented way to replace it


def _set_body(paths: dict[str, Any], path: str, schema: dict[str, Any]) -> None:
    body = {"required": True, "content": {"application/json": {"schema": schema}}}
    paths[path] = paths[path] | {"post": paths[path]["post"] | {"requestBody": body}}
