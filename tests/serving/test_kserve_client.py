"""The official ``tritonclient`` against the live server, with its default binary tensors and a version."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import numpy as np
import pytest
from test_generate_api import picture
from tritonclient import http as triton
from tritonclient.utils import InferenceServerException


@pytest.fixture(scope="module")
def official(client: httpx.Client) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(f"{client.base_url.host}:{client.base_url.port}") as official:
        yield official


def tensor(name: str, values: list[object], datatype: str = "INT64") -> triton.InferInput:
    kinds = {"INT64": np.int64, "FP32": np.float32, "BYTES": np.object_}
    array = np.array(values, kinds[datatype])
    made = triton.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array)
    return made


def test_health_and_metadata(official: triton.InferenceServerClient) -> None:
    assert official.is_server_live()
    assert official.is_server_ready()
    assert official.is_model_ready("fake", "1")
    assert not official.is_model_ready("fake", "2")
    assert official.get_model_metadata("fake", "1")["versions"] == ["1"]
    assert official.get_server_metadata()["name"] == "robuq"


@pytest.mark.parametrize("compression", [None, "gzip"])
def test_it_generates_with_default_binary_tensors(
    official: triton.InferenceServerClient, compression: str | None
) -> None:
    inputs = [tensor("class_id", [2, 1]), tensor("seed", [5, 9]), tensor("steps", [3]),
              tensor("guidance_scale", [1.5], "FP32"), tensor("sampler", [b"ddim"], "BYTES")]  # fmt: skip
    result = official.infer("fake", inputs, model_version="1", request_compression_algorithm=compression)
    assert result.as_numpy("image").tolist() == [picture(2, 5, 3), picture(1, 9, 3)]
    assert result.as_numpy("seed").tolist() == [5, 9]
    assert result.get_response()["model_name"] == "fake"


@pytest.mark.parametrize("binary", [True, False])
def test_outputs_in_binary_or_in_json(official: triton.InferenceServerClient, binary: bool) -> None:
    wanted = [triton.InferRequestedOutput(name, binary_data=binary) for name in ("seed", "image")]
    result = official.infer("fake", [tensor("class_id", [2]), tensor("seed", [5])], outputs=wanted, request_id="mine")
    assert result.as_numpy("seed").tolist() == [5]
    assert len(result.as_numpy("image")) == 1
    assert result.get_response()["id"] == "mine"


def test_its_exception_names_the_input(official: triton.InferenceServerClient) -> None:
    for inputs, name in (
        ([tensor("class_id", [5])], "class_id"),
        ([tensor("class_id", [1]), tensor("steps", [0])], "steps"),
        ([tensor("class_id", [1]), tensor("sampler", [b"plms"], "BYTES")], "sampler"),
    ):
        with pytest.raises(InferenceServerException, match=name):
            official.infer("fake", inputs)
    with pytest.raises(InferenceServerException, match="fake"):
        official.infer("other", [tensor("class_id", [1])])
