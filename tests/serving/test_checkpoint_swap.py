"""``/admin/checkpoint`` with real files: under load nothing is lost, and what cannot be served changes nothing."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from crafted import nested, with_header, with_tensor
from serving_harness import WAIT_S, Engine, live_server
from tiny import TINY, write_tiny

from robuq_core.pipeline import Sampler
from robuq_core.safetensors_file import SafetensorsFile
from server.keys import create_key

DRAW = {"class_id": 1, "seed": 5, "steps": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """old, and new with another number of classes; a damaged file, a foreign one, and links in and out."""
    folder = tmp_path_factory.mktemp("checkpoints")
    write_tiny(folder / "old.safetensors")
    write_tiny(folder / "new.safetensors", TINY.model_copy(update={"num_classes": 7}))
    whole = (folder / "old.safetensors").read_bytes()
    (folder / "short.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "flipped.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    (folder / "notes.txt").write_text("none of yours")
    outside = tmp_path_factory.mktemp("elsewhere") / "secret.safetensors"
    outside.write_bytes(whole)
    (folder / "out.safetensors").symlink_to(outside)
    (folder / "in.safetensors").symlink_to(folder / "new.safetensors")
    (folder / "circle.safetensors").symlink_to(folder / "circle.safetensors")
    (folder / "folder.safetensors").mkdir()
    return folder


def load(options: dict[str, Any]) -> Sampler:
    """As a worker process does, without its file in memory."""
    return Sampler.from_checkpoint(options["checkpoint"])


@pytest.fixture
def server(folder: Path, tmp_path: Path) -> Iterator[tuple[httpx.Client, Engine]]:
    """The old checkpoint on a real socket and an administrator's client."""
    keys = tmp_path / "keys.json"
    key = create_key(keys, "root", scopes=["admin", "generate"])
    options = {"checkpoint": folder / "old.safetensors", "checkpoint_dir": folder, "cache_bytes": 0}
    with live_server(load, api_keys_file=keys, **options) as (client, engine):
        client.headers["Authorization"] = f"Bearer {key}"
        client.timeout = httpx.Timeout(60)
        yield client, engine


def swap(client: httpx.Client, path: Any) -> httpx.Response:
    return client.post("/admin/checkpoint", json={"path": path})


def test_the_files_that_could_be_served(server: tuple[httpx.Client, Engine]) -> None:
    answer = server[0].get("/admin/checkpoint").json()
    assert answer["served"] == "old"
    assert [file["path"] for file in answer["files"]] == [
        f"{name}.safetensors" for name in ("flipped", "in", "new", "old", "short")
    ]
    assert all(file["bytes"] > 0 and file["modified"] for file in answer["files"])


def test_a_swap_is_seen_everywhere(server: tuple[httpx.Client, Engine], folder: Path) -> None:
    client, _ = server
    before = client.post("/generate", json=DRAW).json()
    answer = swap(client, "new.safetensors")
    assert answer.status_code == 200, answer.text
    assert (answer.json()["checkpoint"], answer.json()["num_classes"]) == ("new", 7)
    assert client.get("/info").json() == answer.json()
    assert client.get("/admin/checkpoint").json()["served"] == "new"
    assert 'checkpoint="new"' in client.get("/metrics").text
    assert client.post("/generate", json=DRAW | {"class_id": 8}).status_code == 422
    drawn = client.post("/generate", json=DRAW).json()["images"]
    assert drawn != before["images"]
    assert swap(client, "old.safetensors").status_code == 200
    assert client.post("/generate", json=DRAW).json()["images"] == before["images"]
    assert swap(client, "in.safetensors").json()["checkpoint"] == "in"
    assert client.post("/generate", json=DRAW).json()["images"] == drawn


@pytest.mark.parametrize("name", ["short", "flipped"])
def test_a_damaged_file_is_told_and_the_old_one_goes_on(
    server: tuple[httpx.Client, Engine], folder: Path, name: str
) -> None:
    client, _ = server
    answer = swap(client, f"{name}.safetensors")
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["field"]) == (422, "checkpoint_unusable", "path")
    assert error["message"].startswith(f"{name}.safetensors: ")
    assert "/" not in error["message"].replace(" / ", "")
    assert str(folder) not in answer.text
    assert client.get("/info").json()["checkpoint"] == "old"
    assert client.post("/generate", json=DRAW).status_code == 200
    assert swap(client, "new.safetensors").status_code == 200  # and nothing is left locked


def _spoil(tensor: torch.Tensor) -> None:
    tensor.reshape(-1)[0] = float("nan")


def _overflow(tensor: torch.Tensor) -> None:
    tensor.fill_(3e38)


def _model(**changes: int) -> Callable[[bytes], bytes]:
    return lambda raw: with_header(raw, lambda inner: inner["model"].update(changes))


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (_model(depth=10**8), "depth"),
        (_model(input_size=4096), "input_size"),
        (_model(input_size=2**20), "input_size"),
        (lambda raw: with_header(raw, lambda inner: inner.update(class_names=["x"] * 11)), "class_names"),
        (lambda raw: with_header(raw, lambda _: nested()), "hostile.safetensors"),
        (lambda raw: with_tensor(raw, "blocks.0.attn.qkv.alpha", _spoil), "blocks.0.attn.qkv.alpha"),
        (lambda raw: with_tensor(raw, "final_layer.linear.weight", _spoil), "final_layer.linear.weight"),
        (lambda raw: with_tensor(raw, "blocks.0.mlp.fc2.lowrank_a", _overflow), "hostile"),
    ],
)
def test_a_hostile_file_is_refused_and_the_old_one_stays(
    server: tuple[httpx.Client, Engine], folder: Path, edit: Callable[[bytes], bytes], named: str
) -> None:
    client, _ = server
    path = folder / "hostile.safetensors"
    path.write_bytes(edit((folder / "old.safetensors").read_bytes()))
    try:
        answer = swap(client, path.name)
    finally:
        path.unlink()
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["field"]) == (422, "checkpoint_unusable", "path")
    assert named in error["message"]
    assert client.get("/info").json()["checkpoint"] == "old"
    assert client.post("/generate", json=DRAW).status_code == 200


def test_a_file_that_is_overwritten_in_place_while_it_is_loaded(
    server: tuple[httpx.Client, Engine], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ``cp other.safetensors served.safetensors`` does: the file is cut to nothing, then filled."""
    client, _ = server
    path = folder / "growing.safetensors"
    whole = (folder / "new.safetensors").read_bytes()
    path.write_bytes(whole)
    read = SafetensorsFile.read
    kept = [0, len(whole) // 2, len(whole) - 1]

    def cut_and_read(file: SafetensorsFile, name: str) -> torch.Tensor:
        os.truncate(path, kept[0])
        return read(file, name)

    monkeypatch.setattr(SafetensorsFile, "read", cut_and_read)
    try:
        while kept:
            path.write_bytes(whole)
            answer = swap(client, path.name)
            assert (answer.status_code, answer.json()["error"]["code"]) == (422, "checkpoint_unusable")
            assert client.get("/info").json()["checkpoint"] == "old"
            assert client.post("/generate", json=DRAW).status_code == 200
            del kept[0]
        monkeypatch.undo()
        path.write_bytes(whole)
        assert swap(client, path.name).status_code == 200
        # What is served needs its file no more.
        os.truncate(path, 0)
        assert client.post("/generate", json=DRAW).status_code == 200
    finally:
        path.unlink()


@pytest.mark.parametrize(
    "path",
    ["missing.safetensors", "out.safetensors", "circle.safetensors", "folder.safetensors", "notes.txt", ".", "..",
     "../elsewhere/secret.safetensors", "./new.safetensors", "/etc/passwd", "new.safetensors/", "new.safetensors\0",
     "\0.safetensors", "~/new.safetensors", "ne\u0301w.safetensors", "*.safetensors", "..\\new.safetensors"],
)  # fmt: skip
def test_nothing_leads_out_of_the_folder(server: tuple[httpx.Client, Engine], path: str) -> None:
    client, _ = server
    answer = swap(client, path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "invalid_request")
    assert answer.json()["error"]["field"] in ("path", "body")
    assert "root:" not in answer.text


def test_one_swap_at_a_time(server: tuple[httpx.Client, Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    client, engine = server
    entered, go_on = threading.Event(), threading.Event()
    whole_swap = engine.pool.swap

    async def slow_swap(checkpoint: Path) -> None:
        entered.set()
        await asyncio.to_thread(go_on.wait, WAIT_S)
        await whole_swap(checkpoint)

    monkeypatch.setattr(engine.pool, "swap", slow_swap)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(swap, client, "new.safetensors")
        assert entered.wait(WAIT_S)
        second = swap(client, "old.safetensors")
        assert (second.status_code, second.json()["error"]["code"]) == (409, "swap_in_progress")
        assert client.post("/generate", json=DRAW).status_code == 200
        go_on.set()
        assert first.result(WAIT_S).status_code == 200
    assert swap(client, "old.safetensors").status_code == 200


@pytest.mark.parametrize("kind", [RuntimeError, SystemExit])
def test_a_checkpoint_that_loads_but_does_not_run(
    server: tuple[httpx.Client, Engine],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kind: type[BaseException],
) -> None:
    client, engine = server
    whole_step = Sampler.step

    def broken(sampler: Sampler, rows: Any) -> None:
        if sampler.checkpoint_name == "new":
            raise kind("secret of /some/kernel")
        whole_step(sampler, rows)

    monkeypatch.setattr(Sampler, "step", broken)
    answer = swap(client, "new.safetensors")
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "checkpoint_unusable")
    assert "secret" not in answer.text
    assert "secret" in caplog.text
    assert client.get("/info").json()["checkpoint"] == "old"
    assert client.post("/generate", json=DRAW).status_code == 200
    engine.begin_drain()
    assert swap(client, "old.safetensors").status_code == 503
