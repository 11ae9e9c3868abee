"""Memory and loading, each measured by a fresh process of itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import TINY, write_tiny

from robuq_core.bench.fresh import as_file, measure_loading, measure_memory, write_random
from robuq_core.bench.source import Source, random_checkpoint
from robuq_core.bench.timing import BenchError
from robuq_core.checkpoint import read_checkpoint
from robuq_core.config import QuantConfig

WHERE = {"backend": "auto", "threads": 1, "device": None}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("processes") / "tiny.safetensors"
    write_tiny(path)
    return path


@pytest.mark.slow
def test_memory_is_that_of_the_process(path: Path) -> None:
    uses = measure_memory("tiny", path, 1, WHERE, ("robuq", "bf16"))
    assert [(use.model, use.side, use.batch) for use in uses] == [("tiny", "robuq", 1), ("tiny", "bf16", 1)]
    for use in uses:
        assert use.idle_bytes > 50 * 2**20  # torch alone
        assert 0 < use.over_idle_bytes < 500 * 2**20


@pytest.mark.slow
def test_loading_is_told_in_milestones(path: Path) -> None:
    loading = measure_loading("tiny", path, WHERE, runs=1)
    assert loading.file_bytes == path.stat().st_size
    assert loading.first_image_s is not None
    assert 0 < loading.import_s < loading.ready_s < loading.first_step_s < loading.first_image_s
    assert loading.ready_s == pytest.approx(loading.import_s + loading.load_s)


@pytest.mark.slow
def test_a_process_that_fails_tells_why(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"measuring loading failed: .*no such file"):
        measure_loading("absent", tmp_path / "absent.safetensors", WHERE, runs=1)


def test_random_weights_become_a_file_and_the_file_goes_away(path: Path, tmp_path: Path) -> None:
    source = Source("random", random_checkpoint(TINY, QuantConfig(rank=4)))
    with as_file(source) as written:
        layers = read_checkpoint(written).layers
        assert all(layer.planar.equal(source.checkpoint.layers[name].planar) for name, layer in layers.items())
        size = written.stat().st_size
    assert not written.exists()
    assert write_random(source.checkpoint, tmp_path / "kept.safetensors") == size
    own = Source("tiny", read_checkpoint(path), path)
    with as_file(own) as written:
        assert written == path
