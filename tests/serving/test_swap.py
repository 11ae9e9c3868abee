"""The hot swap: no request is lost and none is mixed up; files that cannot be served change nothing."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from crafted import nested, with_header, with_tensor
from serving_harness import (
    WAIT_S,
    Engine,
    WatchedSampler,
    live_server,
    outcome,
    running_engine,
    sample,
    spec,
    started_engine,
    until,
)
from tiny import TINY, write_tiny

from robuq_core import __version__
from robuq_core.images import encode_image
from robuq_core.pipeline import Sampler
from robuq_core.safetensors_file import SafetensorsFile
from server.fake import FakeRow
from server.keys import create_key
from server.remote_worker import RunFailed
from server.request import NotReady


class Checkpoint(WatchedSampler):
    """Draws every row in the colour of its version."""

    def __init__(self, version: int, **options: object) -> None:
        super().__init__(**options)
        self.version = version
        self.checkpoint_name = f"version-{version}"

    def decode(self, row: FakeRow) -> np.ndarray:
        return np.full((4, 4, 3), self.version, np.uint8)

    def picture(self) -> bytes:
        return encode_image(np.full((4, 4, 3), self.version, np.uint8), "png")


def held_swap(pool: ThreadPoolExecutor, engine: Engine, checkpoint: Checkpoint) -> Future[Any]:
    """A swap in another thread, whose workers warm up until ``checkpoint`` is released."""
    checkpoint.hold()
    swapping = pool.submit(engine.swap, "new", [checkpoint])
    assert checkpoint.entered.acquire(timeout=WAIT_S)
    return swapping


def test_requests_in_flight_end_on_the_old_model_and_new_ones_meet_the_new() -> None:
    old, new = Checkpoint(1), Checkpoint(2)
    with running_engine(old, max_batch_rows=2) as engine:
        assert engine.model.name == "version-1"
        old.hold()
        running = engine.submit([spec(seed=1, steps=3), spec(seed=2, steps=3)], "png")
        waiting = engine.submit([spec(seed=3)], "png")
        assert old.entered.acquire(timeout=WAIT_S)
        engine.swap("new", [new])
        assert engine.model.name == "version-2"
        new.batches.clear()
        after = engine.submit([spec(seed=4)], "png")
        assert set(after.future.result(WAIT_S).images) == {new.picture()}
        old.release()
        for job in (running, waiting):
            assert set(job.future.result(WAIT_S).images) == {old.picture()}
        assert {seed for batch in new.batches for seed, _ in batch} == {4}
        info = {"version": __version__, "checkpoint": "version-2", "backend": "fake", "avg_activation_bits": "2",
                "decoder": "pixels"}  # fmt: skip
        assert sample(engine, "robuq_info", **info) == 1
        # The old worker is let go with its last request.
        until(lambda: engine.launcher.handles[0].exit_code() == 0)
        assert engine.idle


def test_swaps_under_load_lose_nothing_and_mix_nothing_up() -> None:
    stop = threading.Event()
    wrong: list[str] = []
    done = [0] * 4
    pictures = {f"version-{version}": Checkpoint(version).picture() for version in range(6)}

    def client(number: int) -> None:
        while not stop.is_set():
            job = engine.submit([spec(seed=number, steps=1 + number)] * (1 + number % 2), "png")
            if set(job.future.result(WAIT_S).images) != {pictures[job.request.model.name]}:
                wrong.append(job.request.model.name)
            done[number] += 1

    with running_engine(Checkpoint(0), Checkpoint(0), max_queue_images=64) as engine:
        with ThreadPoolExecutor(4) as pool:
            clients = [pool.submit(client, number) for number in range(4)]
            for version in range(1, 6):
                engine.swap(f"v{version}", [Checkpoint(version), Checkpoint(version)])
                before = list(done)
                until(lambda before=before: all(now > then for now, then in zip(done, before, strict=True)))  # type: ignore[misc]
            stop.set()
            for future in clients:
                future.result(WAIT_S)
        assert wrong == []
        assert engine.idle
        assert sample(engine, "robuq_requests_total", finished_reason="completed") == sum(done)


def test_a_model_that_hangs_in_its_warm_up_is_given_up_while_the_old_one_serves() -> None:
    old, hanging = Checkpoint(1), Checkpoint(2)
    with ThreadPoolExecutor(1) as pool, running_engine(old) as engine:
        swapping = held_swap(pool, engine, hanging)
        assert outcome(engine.submit([spec()], "png")) is None
        engine.make_stale()
        assert isinstance(swapping.exception(WAIT_S), RunFailed)
        hanging.release()
        assert engine.model.name == "version-1"
        assert outcome(engine.submit([spec()], "png")) is None
        until(lambda: sample(engine, "robuq_worker_deaths_total", reason="hung") == 1)
        engine.swap("good", [Checkpoint(3)])


def test_a_swap_needs_a_serving_pool() -> None:
    with running_engine(Checkpoint(1)) as engine:
        engine.begin_drain()
        with pytest.raises(NotReady, match="draining"):
            engine.swap("new", [Checkpoint(2)])
    slow = Checkpoint(1)
    slow.hold()
    with started_engine([slow]) as engine, pytest.raises(NotReady, match="starting"):
        engine.swap("new", [Checkpoint(2)])


def test_stopping_ends_a_swap() -> None:
    old, slow = Checkpoint(1), Checkpoint(2)
    with running_engine(old) as engine, ThreadPoolExecutor(1) as pool:
        swapping = held_swap(pool, engine, slow)
        engine.run(engine.pool.stop())
        assert isinstance(swapping.exception(WAIT_S), NotReady)
        slow.release()


def test_a_worker_that_dies_beside_a_swap_does_not_spoil_it() -> None:
    old, new = Checkpoint(1), Checkpoint(2)
    with ThreadPoolExecutor(1) as pool, running_engine(old) as engine:
        swapping = held_swap(pool, engine, new)
        engine.kill()
        until(lambda: sample(engine, "robuq_worker_deaths_total", reason="killed") == 1)
        new.release()
        swapping.result(WAIT_S)
        assert engine.model.name == "version-2"
        assert outcome(engine.submit([spec()], "png")) is None


DRAW = {"class_id": 1, "seed": 5, "steps": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """old, and new with another number of classes; a foreign file, and links in and out."""
    folder = tmp_path_factory.mktemp("checkpoints")
    write_tiny(folder / "old.safetensors")
    write_tiny(folder / "new.safetensors", TINY.model_copy(update={"num_classes": 7}))
    (folder / "notes.txt").write_text("none of yours")
    outside = tmp_path_factory.mktemp("elsewhere") / "secret.safetensors"
    outside.write_bytes((folder / "old.safetensors").read_bytes())
    (folder / "out.safetensors").symlink_to(outside)
    (folder / "in.safetensors").symlink_to(folder / "new.safetensors")
    (folder / "circle.safetensors").symlink_to(folder / "circle.safetensors")
    (folder / "folder.safetensors").mkdir()
    return folder


def load(options: dict[str, Any]) -> Sampler:
    """As a worker process does, without its file in memory."""
    return Sampler.from_checkpoint(options["checkpoint"])


class Admin:
    """An administrator's client of a server with the old checkpoint."""

    def __init__(self, client: httpx.Client, engine: Engine) -> None:
        self.client, self.engine = client, engine

    def swap(self, path: Any) -> httpx.Response:
        return self.client.post("/admin/checkpoint", json={"path": path})

    def generate(self, **more: Any) -> httpx.Response:
        return self.client.post("/generate", json=DRAW | more)

    def refuses(self, path: str, code: str = "checkpoint_unusable") -> str:
        """That path is refused, and the old checkpoint is served; the message."""
        answer = self.swap(path)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (422, code)
        assert error["field"] in ("path", "body")
        assert self.client.get("/info").json()["checkpoint"] == "old"
        assert self.generate().status_code == 200
        return str(error["message"])


@pytest.fixture
def admin(folder: Path, tmp_path: Path) -> Iterator[Admin]:
    keys = tmp_path / "keys.json"
    key = create_key(keys, "root", scopes=["admin", "generate"])
    options = {"checkpoint": folder / "old.safetensors", "checkpoint_dir": folder, "cache_bytes": 0}
    with live_server(load, api_keys_file=keys, **options) as (client, engine):
        client.headers["Authorization"] = f"Bearer {key}"
        yield Admin(client, engine)


def test_a_swap_is_seen_everywhere(admin: Admin) -> None:
    client = admin.client
    listed = client.get("/admin/checkpoint").json()
    assert listed["served"] == "old"
    assert [file["path"] for file in listed["files"]] == [f"{name}.safetensors" for name in ("in", "new", "old")]
    assert all(file["bytes"] > 0 and file["modified"] for file in listed["files"])
    before = admin.generate().json()["images"]
    answer = admin.swap("new.safetensors")
    assert answer.status_code == 200, answer.text
    assert (answer.json()["checkpoint"], answer.json()["num_classes"]) == ("new", 7)
    assert client.get("/info").json() == answer.json()
    assert client.get("/admin/checkpoint").json()["served"] == "new"
    assert 'checkpoint="new"' in client.get("/metrics").text
    assert admin.generate(class_id=8).status_code == 422
    drawn = admin.generate().json()["images"]
    assert drawn != before
    assert admin.swap("old.safetensors").status_code == 200
    assert admin.generate().json()["images"] == before
    assert admin.swap("in.safetensors").json()["checkpoint"] == "in"
    assert admin.generate().json()["images"] == drawn


def _spoil(tensor: torch.Tensor) -> None:
    tensor.reshape(-1)[0] = float("nan")


def _overflow(tensor: torch.Tensor) -> None:
    tensor.fill_(3e38)


def _model(**changes: int) -> Callable[[bytes], bytes]:
    return lambda raw: with_header(raw, lambda inner: inner["model"].update(changes))


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda raw: raw[: len(raw) // 2], "hostile.safetensors: "),
        (lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]), "hostile.safetensors: "),
        (_model(depth=10**8), "depth"),
        (_model(input_size=2**20), "input_size"),
        (lambda raw: with_header(raw, lambda inner: inner.update(class_names=["x"] * 11)), "class_names"),
        (lambda raw: with_header(raw, lambda _: nested()), "hostile.safetensors"),
        (lambda raw: with_tensor(raw, "blocks.0.attn.qkv.alpha", _spoil), "blocks.0.attn.qkv.alpha"),
        (lambda raw: with_tensor(raw, "final_layer.linear.weight", _spoil), "final_layer.linear.weight"),
        (lambda raw: with_tensor(raw, "blocks.0.mlp.fc2.lowrank_a", _overflow), "hostile"),
    ],
)
def test_a_damaged_or_hostile_file_is_told_and_the_old_one_stays(
    admin: Admin, folder: Path, edit: Callable[[bytes], bytes], named: str
) -> None:
    path = folder / "hostile.safetensors"
    path.write_bytes(edit((folder / "old.safetensors").read_bytes()))
    try:
        message = admin.refuses(path.name)
    finally:
        path.unlink()
    assert named in message
    assert str(folder) not in message
    assert admin.swap("new.safetensors").status_code == 200  # and nothing is left locked


def test_a_file_that_is_overwritten_in_place_while_it_is_loaded(
    admin: Admin, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ``cp other.safetensors served.safetensors`` does: the file is cut to nothing, then filled."""
    path = folder / "growing.safetensors"
    whole = (folder / "new.safetensors").read_bytes()
    read = SafetensorsFile.read
    try:
        for kept in (0, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole)

            def cut_and_read(file: SafetensorsFile, name: str, kept: int = kept) -> torch.Tensor:
                os.truncate(path, kept)
                return read(file, name)

            monkeypatch.setattr(SafetensorsFile, "read", cut_and_read)
            admin.refuses(path.name)
        monkeypatch.undo()
        path.write_bytes(whole)
        assert admin.swap(path.name).status_code == 200
        # What is served needs its file no more.
        os.truncate(path, 0)
        assert admin.generate().status_code == 200
    finally:
        path.unlink()


def test_nothing_leads_out_of_the_folder(admin: Admin) -> None:
    for path in (
        *("missing.safetensors", "out.safetensors", "circle.safetensors", "folder.safetensors", "notes.txt", ".", ".."),
        *("../elsewhere/secret.safetensors", "./new.safetensors", "/etc/passwd", "new.safetensors/", "\0.safetensors"),
        *(
            "new.safetensors\0",
            "~/new.safetensors",
            "ne\u0301w.safetensors",
            "*.safetensors",
            "..\\new.safetensors",
            "",
        ),
    ):
        assert "root:" not in admin.refuses(path, "invalid_request"), path


def test_one_swap_at_a_time(admin: Admin, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, go_on = threading.Event(), threading.Event()
    whole_step = Sampler.step

    def held(sampler: Sampler, rows: Any) -> None:
        if sampler.checkpoint_name == "new":
            entered.set()
            assert go_on.wait(WAIT_S)
        whole_step(sampler, rows)

    monkeypatch.setattr(Sampler, "step", held)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(admin.swap, "new.safetensors")
        assert entered.wait(WAIT_S)
        second = admin.swap("old.safetensors")
        assert (second.status_code, second.json()["error"]["code"]) == (409, "swap_in_progress")
        assert admin.generate().status_code == 200
        go_on.set()
        assert first.result(WAIT_S).status_code == 200
    assert admin.swap("old.safetensors").status_code == 200


@pytest.mark.parametrize("kind", [RuntimeError, SystemExit])
def test_a_checkpoint_that_loads_but_does_not_run(
    admin: Admin, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: type[BaseException]
) -> None:
    whole_step = Sampler.step

    def broken(sampler: Sampler, rows: Any) -> None:
        if sampler.checkpoint_name == "new":
            raise kind("secret of /some/kernel")
        whole_step(sampler, rows)

    monkeypatch.setattr(Sampler, "step", broken)
    assert "secret" not in admin.refuses("new.safetensors")
    assert "secret" in caplog.text
    admin.engine.begin_drain()
    assert admin.swap("old.safetensors").status_code == 503
