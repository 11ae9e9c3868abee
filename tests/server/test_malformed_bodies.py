"""Whatever a client sends, the answer is its fault or an image: never a 5xx."""

from __future__ import annotations

import json

import httpx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.api.schemas import GenerateRequest

FIELDS = [*GenerateRequest.model_fields, "extra", ""]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.integers(-2, 20),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["png", "webp", "ddim", "tench", "crane"]),
)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner))
# json.dumps writes NaN, Infinity and lone surrogates, as careless clients do.
BODIES = st.one_of(
    st.binary(max_size=200),
    VALUES.map(json.dumps).map(str.encode),
    st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=6).map(json.dumps).map(str.encode),
)
ACCEPTS = st.sampled_from(["", "*/*", "image/png", "image/*;q=", "a/b;q=1;;,", ";,=", "image/webp;q=2"])
CHECK = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@CHECK
@given(body=BODIES, accept=ACCEPTS)
def test_bad_bodies_are_the_clients_fault(client: httpx.Client, body: bytes, accept: str) -> None:
    answer = client.post("/generate", content=body, headers={"Accept": accept})
    assert answer.status_code in (200, 406, 422)
    if answer.status_code != 200:
        error = answer.json()["error"]
        assert error["code"]
        assert error["message"]
        assert len(answer.content) < 2000
