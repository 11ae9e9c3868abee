"""Whatever fits the document, and much that does not, is answered as the document says."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance
from serving_harness import live_server

from server.fake import FakeSampler

with live_server(FakeSampler()) as (_client, _):
    DOCUMENT = _client.get("/openapi.json").json()
SCHEMA = schemathesis.openapi.from_dict(DOCUMENT)
# What takes no input has none that is wrong, and any text may stand in a path.
OPERATIONS = [
    (method.upper(), path, mode)
    for path, item in DOCUMENT["paths"].items()
    for method, operation in item.items()
    for mode in GenerationMode
    if mode == GenerationMode.POSITIVE
    or "requestBody" in operation
    or any(parameter["in"] == "query" for parameter in operation.get("parameters", ()))
]
CHECK = settings(
    max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate]
)


@pytest.mark.parametrize(("method", "path", "mode"), OPERATIONS, ids=str)
def test_answers_conform(client: httpx.Client, method: str, path: str, mode: GenerationMode) -> None:
    operation = SCHEMA[path][method]

    @CHECK
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        if isinstance(case.body, dict):
            case.body.pop("timeout_s", None)  # 10 ms may well be too short, and 504 the right answer
        response = case.call(base_url=str(client.base_url))
        if response.status_code != 414:  # may meet any route, and is tested elsewhere
            # What a name means, and which fields go together, the document cannot say.
            case.validate_response(response, excluded_checks=[positive_data_acceptance])

    check()


@pytest.mark.parametrize(
    ("path", "body"), [("/generate", {"class_id": 1}), ("/v1/images/generations", {"prompt": "1"})]
)
def test_streams_conform(client: httpx.Client, path: str, body: dict[str, Any]) -> None:
    case = SCHEMA[path]["POST"].Case(body=body | {"stream": True}, media_type="application/json")
    case.call_and_validate(base_url=str(client.base_url))
