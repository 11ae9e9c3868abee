"""Training data and run files that a stranger might have made."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from train.ablations.study import load_study
from train.config import ConfigError, load_config
from train.data import DataError, open_source
from train.data.latents import vae_downscale
from train.data.sources import read_square

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n/x 1 def\nshowpage\n%%EOF\n"


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What Pillow would have given Ghostscript."""
    calls: list[object] = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *arguments, **_: calls.append(arguments))
    return calls


def encoded(kind: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 10, 10)).save(stream, kind)
    return stream.getvalue()


@pytest.mark.parametrize("packed", [False, True])
def test_an_eps_called_png_never_reaches_ghostscript(tmp_path: Path, called: list[object], packed: bool) -> None:
    folder = tmp_path / "data"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "x.png").write_bytes(EPS)
    with Image.open(folder / "a" / "x.png") as image:  # Pillow by itself takes it for one
        assert image.format == "EPS"
    path = Path(shutil.make_archive(str(tmp_path / "data"), "zip", folder)) if packed else folder
    source = open_source(path, 1)
    with pytest.raises(DataError, match=r"x\.png"):
        read_square(source, 0, 8, "resize", 3)
    assert not called


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_named_formats_are_read_whatever_their_suffix(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(encoded(kind))
    assert read_square(open_source(tmp_path, 1), 0, 8, "resize", 3).shape == (3, 8, 8)


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PPM", "ICO", "PDF"])
def test_other_formats_are_not(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.jpg").write_bytes(encoded(kind))
    with pytest.raises(DataError, match=r"x\.jpg"):
        read_square(open_source(tmp_path, 1), 0, 8, "resize", 3)


def write_idx(folder: Path, shape: tuple[int, int, int], content: bytes, suffix: str = ".gz") -> None:
    pack = gzip.compress if suffix else bytes
    header = struct.pack(">HBB3I", 0, 8, 3, *shape)
    (folder / f"train-images-idx3-ubyte{suffix}").write_bytes(pack(header + content))
    (folder / "train-labels-idx1-ubyte").write_bytes(struct.pack(">HBBI", 0, 8, 1, shape[0]) + bytes(min(shape[0], 8)))


def unpacked_bytes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes each read of a gzip file gives."""
    sizes: list[int] = []
    read = gzip.GzipFile.read

    def counted(file: gzip.GzipFile, size: int | None = -1) -> bytes:
        content = read(file, size)
        sizes.append(len(content))
        return content

    monkeypatch.setattr(gzip.GzipFile, "read", counted)
    return sizes


def test_an_idx_file_is_unpacked_no_further_than_its_header_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_idx(tmp_path, (4, 5, 5), bytes(64 * 2**20))
    sizes = unpacked_bytes(monkeypatch)
    with pytest.raises(DataError, match="train-images-idx3-ubyte"):
        open_source(tmp_path, 1)
    assert sum(sizes) < 1000


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_an_idx_header_cannot_ask_for_more_than_the_file_holds(tmp_path: Path, suffix: str) -> None:
    write_idx(tmp_path, (2**32 - 1, 2**32 - 1, 2**32 - 1), bytes(100), suffix)
    with pytest.raises(DataError, match="train-images-idx3-ubyte"):
        open_source(tmp_path, 1)


def test_an_npz_cannot_ask_for_more_than_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    images = io.BytesIO()
    np.lib.format.write_array_header_1_0(images, {"descr": "|u1", "fortran_order": False, "shape": (2**30, 64, 64, 3)})
    labels = io.BytesIO()
    np.save(labels, np.zeros(4, np.int64))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", images.getvalue())
        archive.writestr("labels.npy", labels.getvalue())
    with pytest.raises(DataError, match=r"images\.npy"):
        open_source(path, 1)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("images.npy", images.getvalue())
    with pytest.raises(DataError, match=r"images\.npy"):
        open_source(path, 1)


def test_a_compressed_npz_is_read(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    np.savez_compressed(path, images=np.zeros((4, 64, 64, 3), np.uint8), labels=np.zeros(4, np.int64))
    assert len(open_source(path, 1)) == 4


def test_a_member_of_a_zip_is_no_larger_than_a_photo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.data.sources.MAX_IMAGE_BYTES", 1000)
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/0.png", encoded("PNG"))
        archive.writestr("a/1.png", encoded("PNG") + bytes(10_000))
    source = open_source(path, 1)
    assert read_square(source, 0, 8, "resize", 3).shape == (3, 8, 8)
    with pytest.raises(DataError, match=r"1\.png"):
        read_square(source, 1, 8, "resize", 3)


@pytest.mark.parametrize("opening", ["[", "{a: "])
def test_a_configuration_that_only_nests_is_one_line(tmp_path: Path, opening: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(opening * 20_000)
    for load in (lambda: load_config(path, []), lambda: load_study(path)):
        with pytest.raises(ConfigError, match=path.name) as refused:
            load()
        assert len(str(refused.value).splitlines()) == 1


def test_a_value_that_only_nests_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("run_dir: out\n")
    with pytest.raises(ConfigError, match=r"model\.depth"):
        load_config(path, ["model.depth=" + "[" * 20_000])


def test_numbers_that_are_not_finite_are_named(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("run_dir: out\nmodel: {input_size: 1048576}\ndata: {path: x}\nteacher: {lr: .inf}\n")
    with pytest.raises(ConfigError, match=r"teacher\.lr") as refused:
        load_config(path, [])
    assert "model.input_size" in str(refused.value)


def test_settings_of_a_vae_that_only_nest(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"block_out_channels": ' + "[" * 200_000)
    with pytest.raises(DataError, match=r"data\.vae"):
        vae_downscale(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"block_out_channels": [8] * 10_000}))
    with pytest.raises(DataError, match=r"data\.vae"):
        vae_downscale(tmp_path)
