"""Tables of measured launch shapes: kept whole, read back, refused when broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from crafted import BROKEN

pytest.importorskip("triton")

from robuq_core.errors import UserError
from robuq_core.kernels.triton import tuning
from robuq_core.kernels.triton.config import SHARED_LIMIT, LaunchConfig
from robuq_core.kernels.triton.ternary_linear import candidate_configs, shared_bytes

GPU = "NVIDIA Test 9000"
SMALL = LaunchConfig({"ROWS": 16, "OUTPUTS": 64, "GROUP": 8}, 4, 3)
LARGE = LaunchConfig({"ROWS": 128, "OUTPUTS": 128, "GROUP": 8}, 8, 4, 128)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(tuning.CACHE_VARIABLE, str(tmp_path))
    return tmp_path


def test_a_table_comes_back_and_grows(folder: Path) -> None:
    assert tuning.load_table(GPU) == {}
    path = tuning.save_table(GPU, {"a": SMALL, "b": SMALL})
    assert path == folder / "triton" / "nvidia-test-9000.json"
    tuning.save_table(GPU, {"b": LARGE})
    assert tuning.load_table(GPU) == {"a": SMALL, "b": LARGE}
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_the_users_table_comes_before_the_shipped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tuning.CACHE_VARIABLE, str(tmp_path / "shipped"))
    monkeypatch.setattr(tuning, "SHIPPED", tuning.save_table(GPU, {"a": SMALL, "b": SMALL}).parent)
    monkeypatch.setenv(tuning.CACHE_VARIABLE, str(tmp_path / "own"))
    tuning.save_table(GPU, {"b": LARGE})
    assert tuning.load_table(GPU) == {"a": SMALL, "b": LARGE}


TEXTS = {
    **BROKEN,
    "empty": "",
    "number": '{"a": 1}',
    "no warps": '{"a": {"blocks": {}}}',
    "zero": '{"a": {"blocks": {"ROWS": 0}, "num_warps": 4, "num_stages": 3}}',
}


@pytest.mark.parametrize("kind", TEXTS)
def test_a_broken_table_names_the_file_and_the_fix(kind: str) -> None:
    path = tuning.user_table(GPU)
    path.parent.mkdir()
    path.write_text(TEXTS[kind])
    with pytest.raises(UserError, match=rf"{path.name} .*: delete it or measure again"):
        tuning.load_table(GPU)


def test_rows_of_one_bucket_share_a_key() -> None:
    keys = [tuning.ternary_linear_key(rows, 1152, 4608, 16) for rows in (65, 256, 257, 10_000)]
    assert keys[0] == keys[1] != keys[2] != keys[3]
    assert len({tuning.ternary_linear_key(8, n, k, r) for n, k, r in ((1, 2, 0), (2, 1, 0), (1, 2, 4))}) == 3


def test_what_is_shipped_is_readable() -> None:
    for path in tuning.SHIPPED.glob("*.json"):
        assert tuning.read_table(path), path
        assert json.loads(path.read_text())


@pytest.mark.parametrize("limit", sorted(set(SHARED_LIMIT.values())))
@pytest.mark.parametrize("rows", [1, 16, 100, 4096])
@pytest.mark.parametrize("width", [36, 1152, 4608])
def test_candidates_fit_the_gpu(limit: int, rows: int, width: int) -> None:
    configs = candidate_configs(rows, width, 16, 90, limit)
    assert configs
    for config in configs:
        assert shared_bytes(config) <= limit
        # 64 outputs for each four warps: one tensor-core instruction, and one order of the low-rank sum, for all.
        assert config.blocks["OUTPUTS"] >= 16 * config.num_warps
        assert config.blocks["ROWS"] == 16 or config.blocks["ROWS"] < 2 * rows
