"""Image files carry the settings that made them, and the same pixels as without."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import write_tiny
from typer.testing import CliRunner

from robuq_core.cli import app
from robuq_core.errors import UserError
from robuq_core.images import IMAGE_FORMATS, ImageFormat, encode_image, image_settings, read_settings
from robuq_core.params import RowSpec
from robuq_core.pipeline import Sampler

SPEC = RowSpec(207, 5, 20, 1.5, "ddim", (100, 900), 2)
PIXELS = np.random.default_rng(0).integers(0, 256, (24, 16, 3), dtype=np.uint8)


def pixels_of(encoded: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(encoded)))


@pytest.mark.parametrize("image_format", IMAGE_FORMATS)
@pytest.mark.parametrize("name", ["golden retriever", "caf\u00e9, \u732b", '"quoted"', None])
def test_settings_come_back(image_format: ImageFormat, name: str | None) -> None:
    settings = image_settings(SPEC, "imagenet", name)
    encoded = encode_image(PIXELS, image_format, settings)
    assert read_settings(encoded) == json.loads(json.dumps(settings))
    assert encoded == encode_image(PIXELS, image_format, settings)
    assert (pixels_of(encoded) == pixels_of(encode_image(PIXELS, image_format))).all()


@pytest.mark.parametrize("image_format", IMAGE_FORMATS)
def test_without_settings_none_are_found(image_format: ImageFormat, tmp_path: Path) -> None:
    path = tmp_path / f"plain.{image_format}"
    path.write_bytes(encode_image(PIXELS, image_format))
    with pytest.raises(UserError, match=path.name):
        read_settings(path)


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBP", b"\xff\xd8\xff"])
def test_what_is_no_image_is_refused(content: bytes) -> None:
    with pytest.raises(UserError):
        read_settings(content)


@pytest.mark.parametrize("stored", ["[1]", "{", "[" * 60_000, "{}", '{"checkpoint": 1}' + " " * 70_000])
def test_foreign_text_under_the_same_name_is_refused(stored: str) -> None:
    from PIL import PngImagePlugin

    info, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
    info.add_text("robuq", stored)
    Image.fromarray(PIXELS).save(buffer, "png", pnginfo=info)
    with pytest.raises(UserError):
        read_settings(buffer.getvalue())


@pytest.mark.usefixtures("one_thread")
def test_a_stored_image_can_be_generated_again(tmp_path: Path) -> None:
    checkpoint, out = tmp_path / "tiny.safetensors", tmp_path / "out"
    write_tiny(checkpoint)
    arguments = ["sample", "3", "4", "-c", str(checkpoint), "--steps", "3", "--cache-interval", "2", "-o", str(out)]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    path = out / "0001_class4.png"
    result = CliRunner().invoke(app, ["inspect", str(path)])
    settings = json.loads(result.stdout)
    assert settings["checkpoint"] == "tiny"
    again = Sampler.from_checkpoint(checkpoint)
    fields = {name: value for name, value in settings.items() if name in vars(SPEC) and name != "class_id"}
    (image,) = again.generate([settings["class_id"]], **fields)
    assert (np.asarray(image) == pixels_of(path.read_bytes())).all()
    assert CliRunner().invoke(app, [*arguments, "--no-embed-settings"]).exit_code == 0
    with pytest.raises(UserError):
        read_settings(path)
