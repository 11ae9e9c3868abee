"""The Open Inference Protocol: its field names, its error shape, its tensors."""

from __future__ import annotations

import base64
from typing import Any

import httpx
import pytest
from serving_harness import WatchedSampler, live_server
from test_generate_api import picture

import robuq_core

INFER = "/v2/models/fake/infer"


def tensor(name: str, data: list[Any], datatype: str = "INT64", shape: list[int] | None = None) -> dict[str, Any]:
    return {"name": name, "shape": [len(data)] if shape is None else shape, "datatype": datatype, "data": data}


def outputs(answer: httpx.Response) -> dict[str, dict[str, Any]]:
    assert answer.status_code == 200, answer.text
    return {output["name"]: output for output in answer.json()["outputs"]}


def test_metadata_and_health(client: httpx.Client) -> None:
    server = client.get("/v2").json()
    assert server == {"name": "robuq", "version": robuq_core.__version__, "extensions": []}
    assert client.get("/v2/").json() == server
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True, "live": True}
    assert client.get("/v2/models/fake/ready").json() == {"name": "fake", "ready": True}
    model = client.get("/v2/models/fake").json()
    assert set(model) == {"name", "platform", "inputs", "outputs"}
    assert [(i["name"], i["datatype"], i["shape"]) for i in model["inputs"]] == [
        ("class_id", "INT64", [-1]),
        ("seed", "INT64", [-1]),
        ("steps", "INT64", [-1]),
        ("guidance_scale", "FP32", [-1]),
    ]
    assert [(o["name"], o["datatype"]) for o in model["outputs"]] == [("image", "BYTES"), ("seed", "INT64")]


def test_each_image_by_its_own_values(client: httpx.Client) -> None:
    body = {
        "id": "42",
        "inputs": [
            tensor("class_id", [2, 0, 1]),
            tensor("seed", [7, 8, 2**32 - 1]),
            tensor("steps", [3, 1, 2]),
            tensor("guidance_scale", [1.5, 4, 2.0], "FP32"),
        ],
    }
    answer = client.post(INFER, json=body)
    images = outputs(answer)["image"]
    assert (images["datatype"], images["shape"]) == ("BYTES", [3])
    assert images["parameters"] == {"content_type": "image/png", "encoding": "base64"}
    expected = [picture(2, 7, 3, 1.5), picture(0, 8, 1, 4.0), picture(1, 2**32 - 1, 2, 2.0)]
    assert [base64.b64decode(data) for data in images["data"]] == expected
    assert outputs(answer)["seed"] == tensor("seed", [7, 8, 2**32 - 1])
    assert (answer.json()["id"], answer.json()["model_name"]) == ("42", "fake")
    assert answer.json()["parameters"]["total_s"] > 0
    assert float(answer.headers["x-total-time"]) > 0


def test_one_value_serves_all_images_and_one_seed_counts_up(client: httpx.Client) -> None:
    body = {"inputs": [tensor("class_id", [1, 1]), tensor("seed", [2**32 - 1]), tensor("steps", [2])]}
    found = outputs(client.post(INFER, json=body))
    assert found["seed"]["data"] == [2**32 - 1, 0]
    assert base64.b64decode(found["image"]["data"][1]) == picture(1, 0, 2)
    assert "id" not in client.post(INFER, json=body).json()


def test_nested_data_and_wanted_outputs(client: httpx.Client) -> None:
    body = {"inputs": [tensor("class_id", [[1], [2]], shape=[2, 1])], "outputs": [{"name": "seed"}]}
    assert set(outputs(client.post(INFER, json=body))) == {"seed"}


@pytest.mark.parametrize(
    ("inputs", "field", "text"),
    [
        ([], "inputs", "at least 1"),
        ([tensor("seed", [1])], "inputs", "class_id is missing"),
        ([tensor("class_id", [])], "inputs", "class_id is missing"),
        ([tensor("class", [1])], "inputs[0].name", "class_id, seed, steps, guidance_scale"),
        ([tensor("class_id", [1]), tensor("class_id", [1])], "inputs[1].name", "twice"),
        ([tensor("class_id", [1], "INT32")], "class_id", "INT64"),
        ([tensor("class_id", [5])], "class_id", "from 0 to 4"),
        ([tensor("class_id", [-1])], "class_id", "from 0 to 4"),
        ([tensor("class_id", [True])], "class_id", "integers"),
        ([tensor("class_id", [1.0])], "class_id", "integers"),
        ([tensor("class_id", ["1"])], "class_id", "integers"),
        ([tensor("class_id", [1], shape=[2])], "class_id", "[n]"),
        ([tensor("class_id", [1, 2], shape=[1, 2])], "class_id", "[n]"),
        ([tensor("class_id", [[1, 2]], shape=[2])], "class_id", "[n]"),
        ([tensor("class_id", [0] * 17)], "inputs[0].shape[0]", "16"),
        ([tensor("class_id", [1]), tensor("seed", [1, 2])], "seed", "1 value or 1"),
        ([tensor("class_id", [1]), tensor("seed", [2**32])], "seed", "from 0 to 4294967295"),
        ([tensor("class_id", [1]), tensor("steps", [0])], "steps", "from 1 to 1000"),
        ([tensor("class_id", [1]), tensor("guidance_scale", [21], "FP32")], "guidance_scale", "from 0 to 20"),
        ([{"name": "class_id", "shape": [1], "datatype": "INT64"}], "inputs[0].data", "required"),
    ],
)
def test_a_wrong_tensor_is_named(client: httpx.Client, inputs: list[Any], field: str, text: str) -> None:
    answer = client.post(INFER, json={"inputs": inputs})
    error = answer.json()
    assert (answer.status_code, error["code"], error["field"]) == (400, "invalid_request", field)
    assert isinstance(error["error"], str)  # as the protocol has it
    assert text in error["error"]


def test_other_mistakes(client: httpx.Client) -> None:
    good = {"inputs": [tensor("class_id", [1])]}
    for path in ("/v2/models/other", "/v2/models/other/ready"):
        assert (client.get(path).status_code, client.get(path).json()["code"]) == (404, "model_not_found")
    assert client.post("/v2/models/other/infer", json=good).json()["code"] == "model_not_found"
    answer = client.post(INFER, json=good | {"outputs": [{"name": "picture"}]})
    assert (answer.status_code, answer.json()["field"]) == (400, "outputs[0].name")
    answer = client.post(INFER, json=good, headers={"Inference-Header-Content-Length": "10"})
    assert "binary" in answer.json()["error"]
    for body in (b"", b"[]", b"{", b'{"inputs": 1}', b'{"more": 1, "inputs": []}'):
        assert client.post(INFER, content=body).status_code == 400
    assert client.get("/v2/nothing").json()["code"] == "not_found"


def test_health_follows_the_engine() -> None:
    with live_server(WatchedSampler()) as (client, engine):
        engine.begin_drain()
        assert client.get("/v2/health/live").json() == {"live": True}
        for path in ("/v2/health/ready", "/v2/models/fake/ready"):
            answer = client.get(path)
            assert (answer.status_code, answer.json()["ready"]) == (503, False)
        answer = client.post(INFER, json={"inputs": [tensor("class_id", [1])]})
        assert (answer.status_code, answer.json()["code"]) == (503, "draining")
