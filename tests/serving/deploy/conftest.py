"""The metrics of a server to which everything has happened that monitoring should show."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from deploy_harness import Exposition
from serving_harness import WAIT_S, WatchedSampler, live_server, spec, until

from server.keys import create_key


@pytest.fixture(scope="session")
def exposition(tmp_path_factory: pytest.TempPathFactory) -> Exposition:
    """After requests with each end that a sampler can bring about, and after each refusal by queue or key."""
    keys_file = tmp_path_factory.mktemp("keys") / "keys.json"
    key = create_key(keys_file, "draws")
    reader = create_key(keys_file, "reads", scopes=["read"])
    hasty = create_key(keys_file, "hasty", requests_per_minute=1)
    sampler = WatchedSampler()
    sampler.faulty_seeds = {13}
    with (
        live_server(sampler, max_batch_rows=2, api_keys_file=keys_file) as (client, engine),
        ThreadPoolExecutor(3) as pool,
    ):

        def draw(sent: str | None = key, **body: object) -> int:
            headers = {"Authorization": f"Bearer {sent}"} if sent else {}
            return client.post("/generate", json={"class_id": 1, "steps": 2, **body}, headers=headers).status_code

        assert [draw(), draw(seed=13), draw(None), draw(reader), draw(hasty), draw(hasty)] == [
            *(200, 500, 401, 403, 200, 429),
        ]
        sampler.hold()
        first = pool.submit(draw)
        assert sampler.entered.acquire(timeout=WAIT_S)
        assert draw(timeout_s=0.05) == 504
        engine.cancel(engine.submit([spec()], "png"))
        second = pool.submit(draw, num_images=16)
        until(lambda: engine.requests_waiting == 1)
        assert draw() == 429
        sampler.release()
        assert (first.result(), second.result()) == (200, 200)
        until(lambda: engine.idle)
        (worker,) = engine.pool._fleet.workers  # type: ignore[union-attr]
        engine.call(lambda: setattr(worker, "gpu_memory", [0, 0, 0]))  # as where CUDA is used
        metrics = client.get("/metrics", headers={"Authorization": f"Bearer {reader}"})
    return Exposition.parse(metrics.text)
