"""The official ``openai`` client against the live server: images, streams, models, and its exception classes."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator

import httpx
import openai
import pytest
from PIL import Image
from serving_harness import WatchedSampler, live_server
from test_generate_api import picture

from robuq_core.params import ImageParams
from server import service
from server.openai_api import ImagesBody

PATH = "/v1/images/generations"


def official_client(client: httpx.Client) -> openai.OpenAI:
    return openai.OpenAI(base_url=str(client.base_url).rstrip("/") + "/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def official(client: httpx.Client) -> Iterator[openai.OpenAI]:
    with official_client(client) as official:
        yield official


def test_a_prompt_is_a_class_name_or_its_id(official: openai.OpenAI) -> None:
    for prompt in ("great white shark", "Great_White shark", "2", " 2 "):
        answer = official.images.generate(prompt=prompt, extra_body={"seed": 5})
        assert answer.data is not None
        assert answer.data[0].b64_json == base64.b64encode(picture(2, 5)).decode()
        assert answer.data[0].revised_prompt == "great white shark"
        assert (answer.size, answer.output_format, answer.background) == ("32x32", "png", "opaque")
        assert answer.created > 1.7e9


def test_every_option_that_it_knows(official: openai.OpenAI) -> None:
    answer = official.images.generate(
        prompt="tench",
        model="fake",
        n=3,
        size="32x32",
        response_format="b64_json",
        output_format="webp",
        background="opaque",
        quality="high",
        moderation="low",
        user="someone",
        extra_body={"steps": 2, "guidance_scale": 4.0, "sampler": "ddpm", "priority": 9, "timeout_s": 5},
    )
    assert answer.data is not None
    assert len(answer.data) == 3
    assert Image.open(io.BytesIO(base64.b64decode(answer.data[2].b64_json or ""))).format == "WEBP"
    assert answer.model_extra is not None
    assert (answer.model_extra["steps"], answer.model_extra["guidance_scale"]) == (2, 4.0)
    assert [image.seed for image in answer.data] == [  # type: ignore[attr-defined]
        (answer.model_extra["seed"] + i) % 2**32 for i in range(3)
    ]


def test_streams_tell_previews_and_each_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "HEARTBEAT_S", 0.05)  # the answer begins before the first step does
    sampler = WatchedSampler()
    with live_server(sampler) as (client, _), official_client(client) as official:
        sampler.hold()
        with official.images.generate(
            prompt="tench", n=2, stream=True, partial_images=2, extra_body={"steps": 7, "guidance_scale": 1}
        ) as answer:
            events = []
            for _ in range(2):  # previews, after three steps each
                sampler.permit(3)
                events += [next(answer), next(answer)]
            sampler.release()
            events += answer
    partial = [event for event in events if event.type == "image_generation.partial_image"]
    completed = [event for event in events if event.type == "image_generation.completed"]
    assert len(partial) + len(completed) == len(events)
    assert [event.partial_image_index for event in partial] == [0, 0, 1, 1]
    assert [event.image for event in completed] == [0, 1]  # type: ignore[attr-defined]
    for event in events:
        assert Image.open(io.BytesIO(base64.b64decode(event.b64_json))).size == (32, 32)
        assert (event.size, event.output_format, event.background, event.quality) == ("32x32", "png", "opaque", "auto")
    assert completed[0].usage.total_tokens == 0


def test_models(official: openai.OpenAI) -> None:
    assert [model.id for model in official.models.list()] == ["fake"]
    model = official.models.retrieve("fake")
    assert (model.object, model.owned_by) == ("model", "robuq")
    assert model.created > 1.7e9
    with pytest.raises(openai.NotFoundError):
        official.models.retrieve("dall-e-2")


@pytest.mark.parametrize(
    ("options", "field", "text"),
    [
        ({"prompt": "goldfsh"}, "prompt", "goldfish"),
        ({"prompt": "crane"}, "prompt", "3, 4"),
        ({"prompt": "5"}, "prompt", "from 0 to 4"),
        ({"n": 17}, "n", "from 1 to 16"),
        ({"size": "1024x1024"}, "size", "auto or 32x32"),
        ({"response_format": "url"}, "response_format", "b64_json"),
        ({"background": "transparent"}, "background", "auto, opaque"),
        ({"partial_images": 4, "stream": True}, "partial_images", "from 0 to 3"),
        ({"extra_body": {"steps": 0}}, "steps", "from 1 to 1000"),
        ({"extra_body": {"timeout_s": 1e9}}, "timeout_s", "from 0.01 to 300"),
        ({"n": 2, "extra_body": {"num_images": 2}}, "n", "num_images"),
        ({"extra_body": {"class_id": 5}}, "class_id", "from 0 to 4"),
    ],
)
def test_a_mistake_is_a_bad_request_that_names_the_field(
    official: openai.OpenAI, options: dict[str, object], field: str, text: str
) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        official.images.generate(**{"prompt": "tench", **options})  # type: ignore[call-overload]
    error = raised.value
    assert (error.code, error.param, error.type) == ("invalid_request", field, "invalid_request_error")
    assert error.body["field"] == field  # type: ignore[index]
    assert text in error.body["message"]  # type: ignore[index]
    assert error.request_id


def test_its_exception_classes() -> None:
    sampler = WatchedSampler()
    sampler.faulty_seeds = {7}
    with live_server(sampler) as (client, engine):
        official = official_client(client)
        with pytest.raises(openai.NotFoundError) as missing:
            official.images.generate(prompt="tench", model="dall-e-2")
        assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
        with pytest.raises(openai.InternalServerError) as failed:
            official.images.generate(prompt="tench", extra_body={"seed": 7})
        assert (failed.value.code, failed.value.type) == ("generation_failed", "server_error")
        sampler.faulty_seeds = {8}
        with pytest.raises(openai.APIError, match="the model failed"):
            list(official.images.generate(prompt="tench", stream=True, extra_body={"seed": 8}))
        engine.begin_drain()
        with pytest.raises(openai.InternalServerError) as draining:
            official.images.generate(prompt="tench")
        assert (draining.value.status_code, draining.value.code) == (503, "draining")


def test_a_body_that_is_no_object(client: httpx.Client) -> None:
    for body in (b"", b"[]", b"{", b"\xff"):
        answer = client.post(PATH, content=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "body")
        assert '{"prompt": "golden retriever"}' in answer.json()["error"]["message"]
    answer = client.post(PATH, json={"n": 1})
    assert (answer.json()["error"]["param"], "is missing" in answer.json()["error"]["message"]) == ("prompt", True)


def test_every_sampling_field_reaches_the_sampler(client: httpx.Client) -> None:
    fields = {"seed": 3, "steps": 3, "guidance_scale": 2.0, "guidance_interval": [100, 900], "cache_interval": 2,
              "sampler": "ddpm"}  # fmt: skip
    answer = client.post(PATH, json={"prompt": "1", **fields}).json()
    assert {name: answer[name] for name in fields} == fields
    assert set(ImageParams.model_fields) <= set(ImagesBody.model_fields)
    by_id = client.post(PATH, json={"prompt": "any", "class_id": 2, "num_images": 2}).json()
    assert (by_id["class_id"], len(by_id["data"])) == (2, 2)


def test_unknown_fields_are_ignored_and_named(client: httpx.Client) -> None:
    body = {"prompt": "1", "cfg": 1, "quality": "hd", "user": None, "x\r\ny: z": 2, "\u732b": 3}
    answer = client.post(PATH, json=body)
    assert answer.status_code == 200
    for name in ("cfg", "quality", "user"):
        assert name in answer.headers["warning"]
    assert "y" not in answer.headers
    assert "warning" not in client.post(PATH, json={"prompt": "1"}).headers
    many = client.post(PATH, json={"prompt": "1", **{f"field_{i}": i for i in range(200)}})
    assert len(many.headers["warning"]) < 1000


def test_null_is_the_same_as_absent(client: httpx.Client) -> None:
    nulls = dict.fromkeys(name for name in ImagesBody.model_fields if name != "prompt")
    assert client.post(PATH, json={"prompt": "1", **nulls}).status_code == 200
    assert client.post(PATH, json={"prompt": None}).json()["error"]["param"] == "prompt"
