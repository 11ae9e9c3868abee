"""The Open Inference Protocol: its field names, its error shape, its tensors."""

from __future__ import annotations

import base64
import json
import struct
from typing import Any

import httpx
import pytest
from serving_harness import WatchedSampler, live_server
from test_generate_api import picture

import robuq_core
from robuq_core.params import ImageParams

INFER = "/v2/models/fake/infer"


def tensor(name: str, data: list[Any], datatype: str = "INT64", shape: list[int] | None = None) -> dict[str, Any]:
    return {"name": name, "shape": [len(data)] if shape is None else shape, "datatype": datatype, "data": data}


def outputs(answer: httpx.Response) -> dict[str, dict[str, Any]]:
    assert answer.status_code == 200, answer.text
    return {output["name"]: output for output in answer.json()["outputs"]}


def test_metadata_and_health(client: httpx.Client) -> None:
    server = client.get("/v2").json()
    assert server == {"name": "robuq", "version": robuq_core.__version__, "extensions": ["binary_tensor_data"]}
    assert client.get("/v2/").json() == server
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True, "live": True}
    assert client.get("/v2/models/fake/ready").json() == {"name": "fake", "ready": True}
    model = client.get("/v2/models/fake").json()
    assert set(model) == {"name", "versions", "platform", "inputs", "outputs"}
    inputs = {i["name"]: (i["datatype"], i["shape"]) for i in model["inputs"]}
    assert set(inputs) == set(ImageParams.model_fields)
    assert inputs["class_id"] == inputs["seed"] == inputs["steps"] == ("INT64", [-1])
    assert inputs["guidance_scale"] == ("FP32", [-1])
    assert inputs["guidance_interval"] == ("INT64", [-1, 2])
    assert inputs["sampler"] == inputs["class_name"] == ("BYTES", [-1])
    assert client.get("/v2/models/fake/versions/1").json() == model
    assert client.get("/v2/models/fake/versions/1/ready").json() == {"name": "fake", "ready": True}
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
        ([tensor("seed", [1])], "class_id", "class_name"),
        ([tensor("class_id", [])], "class_id", "[n]"),
        ([tensor("class", [1])], "inputs[0].name", "guidance_scale"),
        ([tensor("class_id", [1]), tensor("class_id", [1])], "inputs[1].name", "twice"),
        ([tensor("class_id", [1], "INT32")], "class_id", "INT64"),
        ([tensor("class_id", [5])], "class_id", "from 0 to 4"),
        ([tensor("class_id", [-1])], "class_id", "from 0 to 4"),
        ([tensor("class_id", [True])], "class_id", "INT64"),
        ([tensor("class_id", [1.0])], "class_id", "INT64"),
        ([tensor("class_id", ["1"])], "class_id", "INT64"),
        ([tensor("class_id", [1], shape=[2])], "class_id", "[n]"),
        ([tensor("class_id", [1, 2], shape=[1, 2])], "class_id", "[n]"),
        ([tensor("class_id", [[[1, 2]]], shape=[2])], "class_id", "[n]"),
        ([tensor("class_id", [0] * 17)], "inputs[0].shape[0]", "16"),
        ([tensor("class_id", [1, 2, 3]), tensor("seed", [1, 2])], "seed", "1 value or 3"),
        ([tensor("class_id", [1]), tensor("seed", [2**53])], "seed", "from -1 to 9007199254740991"),
        ([tensor("class_id", [1]), tensor("num_images", [17])], "num_images", "from 1 to 16"),
        ([tensor("class_id", [1]), tensor("num_images", [0])], "num_images", "from 1 to 16"),
        ([tensor("class_id", [1]), tensor("sampler", ["plms"], "BYTES")], "sampler", "ddim"),
        ([tensor("class_id", [1]), tensor("class_name", ["tench"], "BYTES")], "class_id", "class_name"),
        ([tensor("class_id", [1]), tensor("guidance_interval", [1])], "guidance_interval", "[n, 2]"),
        ([tensor("class_id", [1]), tensor("guidance_interval", [9, 1])], "guidance_interval", "lower"),
        ([tensor("class_id", [1]), tensor("steps", [0])], "steps", "from 1 to 1000"),
        ([tensor("class_id", [1]), tensor("guidance_scale", [21], "FP32")], "guidance_scale", "from 0 to 20"),
        ([{"name": "class_id", "shape": [1], "datatype": "INT64"}], "class_id", "data"),
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
    for outputs in (["image"] * 16, ["seed", "seed"]):
        answer = client.post(INFER, json=good | {"outputs": [{"name": name} for name in outputs]})
        assert (answer.status_code, answer.json()["field"]) == (400, "outputs[1].name")
    assert client.post("/v2/models/fake/versions/2/infer", json=good).json()["code"] == "model_not_found"
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


def test_every_sampling_field_of_each_image(client: httpx.Client) -> None:
    body = {
        "inputs": [
            tensor("class_name", ["tench", "goldfish"], "BYTES"),
            tensor("seed", [7]),
            tensor("steps", [2, 3]),
            tensor("sampler", ["ddpm"], "BYTES"),
            tensor("cache_interval", [1, 2]),
            tensor("guidance_interval", [[0, 999], [100, 900]], shape=[2, 2]),
        ]
    }
    several = outputs(client.post(INFER, json=body))["image"]["data"]
    alone = {"class_name": "goldfish", "seed": 8, "steps": 3, "sampler": "ddpm", "cache_interval": 2}
    answer = client.post("/generate", json=alone | {"guidance_interval": [100, 900]})
    assert answer.json()["images"] == several[1:]
    counted = {"inputs": [tensor("class_id", [1]), tensor("num_images", [3]), tensor("guidance_interval", [5, 6])]}
    assert outputs(client.post(INFER, json=counted))["image"]["shape"] == [3]


def binary(inputs: list[tuple[str, str, list[int], bytes]], **more: Any) -> tuple[bytes, dict[str, str]]:
    """A body in Triton's binary form, and its header."""
    tensors = [
        {"name": name, "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": len(raw)}}
        for name, datatype, shape, raw in inputs
    ]
    head = json.dumps({"inputs": tensors, **more}).encode()
    return head + b"".join(raw for *_, raw in inputs), {"Inference-Header-Content-Length": str(len(head))}


def test_binary_tensors_both_ways(client: httpx.Client) -> None:
    content, headers = binary(
        [
            ("class_id", "INT64", [2], struct.pack("<qq", 2, 1)),
            ("seed", "INT64", [1], struct.pack("<q", 5)),
            ("guidance_scale", "FP32", [1], struct.pack("<f", 1.5)),
            ("sampler", "BYTES", [1], struct.pack("<I", 4) + b"ddim"),
        ],
        parameters={"binary_data_output": True},
    )
    answer = client.post(INFER, content=content, headers=headers)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/octet-stream")
    length = int(answer.headers["inference-header-content-length"])
    head, rest = json.loads(answer.content[:length]), answer.content[length:]
    found = {}
    for output in head["outputs"]:
        size = output["parameters"]["binary_data_size"]
        found[output["name"]], rest = rest[:size], rest[size:]
    assert not rest
    assert found["seed"] == struct.pack("<qq", 5, 6)
    pictures = [picture(2, 5), picture(1, 6)]
    assert found["image"] == b"".join(struct.pack("<I", len(each)) + each for each in pictures)


@pytest.mark.parametrize(
    ("content", "length", "field"),
    [
        (b"{}", "9", "Inference-Header-Content-Length"),
        (b"{}", "-1", "Inference-Header-Content-Length"),
        (b"{}", "9" * 5000, "Inference-Header-Content-Length"),
        (b"{}", "0" * 5000, "Inference-Header-Content-Length"),
        *(
            (content, headers["Inference-Header-Content-Length"], field)
            for (content, headers), field in (
                (binary([("class_id", "INT64", [1], b"1234567")]), "class_id"),
                (binary([("class_id", "INT64", [2], bytes(8))]), "class_id"),
                (binary([("class_name", "BYTES", [1], struct.pack("<I", 2**32 - 1) + b"x")]), "class_name"),
                (binary([("class_name", "BYTES", [1], b"ab")]), "class_name"),
                (binary([("class_name", "BYTES", [1], struct.pack("<I", 1) + b"\xff")]), "class_name"),
            )
        ),
    ],
)
def test_wrong_binary_tensors_are_named(client: httpx.Client, content: bytes, length: str, field: str) -> None:
    answer = client.post(INFER, content=content, headers={"Inference-Header-Content-Length": length})
    assert (answer.status_code, answer.json()["field"]) == (400, field)


def test_bytes_that_no_tensor_names(client: httpx.Client) -> None:
    content, headers = binary([("class_id", "INT64", [1], struct.pack("<q", 1))])
    answer = client.post(INFER, content=content + b"more", headers=headers)
    assert (answer.status_code, answer.json()["field"]) == (400, "inputs")
    for size in (-1, True, "8", 10**9):
        body = {"inputs": [{"name": "class_id", "shape": [1], "datatype": "INT64",
                            "parameters": {"binary_data_size": size}}]}  # fmt: skip
        assert client.post(INFER, json=body).json()["field"] == "class_id"
