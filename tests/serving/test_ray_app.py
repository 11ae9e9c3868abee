"""The Ray Serve application on a cluster of this machine: routes, scaling, the loss of a node under load."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from fastapi.testclient import TestClient
from ray_harness import WAIT_S, Load, LocalCluster, draw, local_cluster, until, why_not
from tiny import write_tiny

pytest.importorskip("ray.serve")

from ray import serve

from server.app import create_app
from server.metrics import Metrics
from server.pool import Pool
from server.settings import Settings

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
STEPS = 50  # long enough for a request to be under way when its node is lost
SEEDS = 5


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
def alone(checkpoint: Path) -> Iterator[TestClient]:
    """The server of one process."""
    settings = Settings(checkpoint=checkpoint, max_batch_rows=8, log_level="warning", host="0.0.0.0", cache_bytes=0)
    pool = Pool(settings, Metrics(settings.max_batch_rows))
    with TestClient(create_app(pool, settings)) as client:
        until(lambda: pool.status == "ready", "the warm-up")
        yield client


@pytest.fixture(scope="module")
def cluster(checkpoint: Path) -> Iterator[LocalCluster]:
    with local_cluster() as cluster:
        cluster.serve_run(
            *(f"checkpoint={checkpoint}", "max_batch_rows=8", "log_level=warning", "cache_bytes=0"),
            *("max_replicas=2", "images_per_replica=2", "upscale_delay_s=0.5", "downscale_delay_s=1"),
        )
        yield cluster


@pytest.fixture
def client(cluster: LocalCluster) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=cluster.url, timeout=WAIT_S) as client:
        yield client


@pytest.mark.parametrize("path", ["/", "/health", "/ready", "/info", "/queue", "/metrics", "/openapi.json"])
def test_the_routes_are_those_of_the_server(client: httpx.Client, alone: TestClient, path: str) -> None:
    answer, expected = client.get(path), alone.get(path)
    assert answer.status_code == expected.status_code == 200
    assert answer.headers.get_list("x-request-id") != []
    # But for what Ray's proxies and their HTTP server add.
    assert set(answer.headers) - {"date", "server"} == set(expected.headers)
    if path != "/metrics":
        assert answer.content == expected.content


def test_a_request_has_one_id(client: httpx.Client) -> None:
    answer = client.get("/health", headers={"X-Request-Id": "mine"})
    assert answer.headers.get_list("x-request-id") == ["mine"]
    answer = client.get("/health", headers={"X-Request-Id": "not fit for a log"})
    assert len(set(answer.headers.get_list("x-request-id"))) == 2


def test_a_seed_has_the_bytes_that_it_has_in_one_process(client: httpx.Client, alone: TestClient) -> None:
    for seed in range(SEEDS):
        answer, expected = draw(client, seed, STEPS), draw(alone, seed, STEPS)
        assert answer.status_code == 200, answer.text
        assert answer.content == expected.content
    wrong, expected = (it.post("/generate", json={"class_id": 4711}) for it in (client, alone))
    assert (wrong.status_code, wrong.json()) == (422, expected.json())


def test_progress_is_streamed_and_a_client_that_hangs_up_frees_its_rows(client: httpx.Client) -> None:
    def stream(**body: object) -> list[str]:
        seen = []
        with client.stream("POST", "/generate", json={"class_id": 1, "stream": True, **body}) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream"), answer.read()
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


@pytest.mark.slow
def test_replicas_follow_the_work_and_a_lost_node_costs_retries_alone(cluster: LocalCluster, alone: TestClient) -> None:
    assert replicas() == 1
    cluster.add_worker()
    with Load(cluster.url, threads=8, steps=STEPS, seeds=SEEDS) as load:
        until(lambda: replicas() == 2, "a second replica")
        load.more(30)
        undisturbed = list(load.retries)
        cluster.lose_worker()
        load.more(60)
        cluster.add_worker()
        until(lambda: replicas() == 2, "a replica on the node that came back")
        load.more(30)
    assert undisturbed == []
    assert load.retries, "the node had nothing under way, so its loss shows nothing"
    assert load.lost == []
    expected = {(seed, draw(alone, seed, STEPS).content) for seed in range(SEEDS)}
    assert set(load.images) == expected
    with Load(cluster.url, threads=1, steps=STEPS, seeds=SEEDS) as little:
        until(lambda: replicas() == 1, "a single replica")
        little.more(2 * SEEDS)
    assert (little.retries, little.lost) == ([], []), "a replica that is not needed any more is drained"
    assert set(little.images) == expected
