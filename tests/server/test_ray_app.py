"""The Ray Serve application on a cluster of two nodes: its routes, its scaling, and the loss of a node under load.

Run it with ROBUQ_TEST_RAY=1 on a machine with cores to spare: Ray starts a dozen processes a node.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from ray_harness import WAIT_S, Load, TwoNodes, two_nodes, until
from tiny import write_tiny

pytest.importorskip("ray.serve")

from ray import serve

from server.ray_app import ClusterSettings, app

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("ROBUQ_TEST_RAY" not in os.environ, reason="needs cores to spare; set ROBUQ_TEST_RAY=1"),
]
STEPS = 100  # long enough for a request to be under way when its node is lost


def replicas() -> int:
    """How many run."""
    (deployment,) = serve.status().applications["default"].deployments.values()
    return deployment.replica_states.get("RUNNING", 0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ray") / "tiny.safetensors"
    write_tiny(path)
    return path


@pytest.fixture(scope="module")
def nodes(checkpoint: Path) -> Iterator[TwoNodes]:
    with two_nodes() as nodes:
        settings = ClusterSettings(
            checkpoint=checkpoint, backend="reference", max_replicas=2, images_per_replica=2, upscale_delay_s=0.5,
            max_batch_rows=8, log_level="warning",
        )  # fmt: skip
        serve.run(app(settings))
        yield nodes


@pytest.fixture
def client(nodes: TwoNodes) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=nodes.url, timeout=WAIT_S) as client:
        yield client


@pytest.mark.parametrize(
    "path",
    [
        *("/", "/health", "/ready", "/info", "/classes?query=3", "/queue", "/metrics", "/openapi.json"),
        *("/v1/models", "/v2", "/v2/health/ready"),
    ],
)
def test_the_routes_are_those_of_the_server(client: httpx.Client, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 200
    assert answer.headers.get_list("x-request-id") != []


def test_what_is_wrong_is_told_as_by_the_server(client: httpx.Client) -> None:
    answer = client.post("/generate", json={"class_id": 4711})
    assert answer.status_code == 422
    assert answer.json()["error"]["field"] == "class_id"


def test_progress_is_streamed_and_a_client_that_hangs_up_frees_its_rows(client: httpx.Client) -> None:
    def stream(**body: object) -> list[str]:
        seen = []
        with client.stream("POST", "/generate", json={"class_id": 1, "stream": True, **body}) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    seen.append(json.loads(line[6:])["type"])
                    if body.get("num_images") == 16:
                        break
        return seen

    seen = stream(steps=4)
    assert seen[0] == "image_generation.step"
    assert seen[-1] == "image_generation.completed"
    stream(steps=1000, num_images=16)
    until(lambda: 'robuq_requests_total{finished_reason="cancelled"} 1.0' in client.get("/metrics").text, "cancelled")
    until(lambda: client.get("/queue").json()["images_in_flight"] == 0, "free rows")


def test_work_brings_a_second_replica_and_a_lost_node_costs_retries_alone(nodes: TwoNodes) -> None:
    with Load(nodes.url, threads=8, steps=STEPS) as load:
        until(lambda: replicas() == 2, "a second replica")
        load.more(30)
        undisturbed = len(load.retries)
        nodes.lose_worker()
        load.more(60)
        nodes.regain_worker()
        until(lambda: replicas() == 2, "a replica on the node that came back")
        load.more(30)
    assert undisturbed == 0
    assert load.retries, "the node had nothing under way, so its loss shows nothing"
    assert not load.lost
    assert {seed: len(images) for seed, images in load.images.items()} == dict.fromkeys(range(load.seeds), 1)
    assert len(set.union(*load.images.values())) == load.seeds
