"""The sampling fields: one definition that HTTP, the command line and Python share, and errors that name the field."""

import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robuq_core.classes import ClassNames
from robuq_core.config import MAX_SEED, SamplerConfig
from robuq_core.params import MAX_REQUEST_SEED, ImageParams, ParamError, RowSpec, check_spec, read_params

DEFAULTS = SamplerConfig(sampler="ddim", steps=7, guidance_scale=2.5)


def read(**fields: Any) -> ImageParams:
    return read_params(ImageParams, json.dumps(fields).encode())


def test_null_is_the_same_as_absent_for_every_field() -> None:
    nulls = read(**dict.fromkeys(ImageParams.model_fields))
    assert nulls == ImageParams()
    assert not nulls.given


def test_defaults_come_from_the_checkpoint_and_given_values_win() -> None:
    resolved = read(class_id=3, steps=2).resolved(DEFAULTS, seed=11)
    assert resolved.spec(3, 1) == RowSpec(3, 12, 2, 2.5, "ddim")
    assert len(read(num_images=4).resolved(DEFAULTS).specs(0)) == 4


def test_a_random_seed_is_one_of_the_models() -> None:
    for body in ({}, {"seed": None}, {"seed": -1}):
        seeds = {read(**body).resolved(DEFAULTS).seed for _ in range(20)}
        assert len(seeds) > 10
        assert all(seed is not None and 0 <= seed <= MAX_SEED for seed in seeds)


@given(st.integers(0, MAX_REQUEST_SEED), st.integers(0, 15))
def test_large_seeds_are_kept_and_wrap_in_the_images(seed: int, image: int) -> None:
    params = read(seed=seed, num_images=16).resolved(DEFAULTS)
    assert params.seed == seed
    assert params.spec(0, image).seed == (seed + image) % 2**32


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("class_id", value) for value in (-1, 1.0, True, "1", [], float("inf"))),
        *(("class_name", value) for value in ("", "x" * 201, 5)),
        *(("num_images", value) for value in (0, 17, "1", 1.5)),
        *(("seed", value) for value in (-2, MAX_REQUEST_SEED + 1, 10**300, 0.5, "7")),
        *(("steps", value) for value in (0, 1001, True)),
        *(("guidance_scale", value) for value in (-0.1, 20.1, float("nan"), float("inf"), "2")),
        *(("guidance_interval", value) for value in ([1], [1, 2, 3], [5, 4], [0, 1000], ["0", 5], 7)),
        *(("cache_interval", value) for value in (0, 1001)),
        ("sampler", "plms"),
        ("unheard_of", 1),
    ],
)
def test_a_bad_value_names_its_field(field: str, value: Any) -> None:
    with pytest.raises(ParamError, match=field) as caught:
        read(**{field: value})
    assert caught.value.field == field


@pytest.mark.parametrize("body", [b"", b"[]", b"3", b"{", b'{"seed": }', b"\xff", b"[" * 100_000, b'{"seed": 1}x'])
def test_what_is_no_object_names_the_body(body: bytes) -> None:
    with pytest.raises(ParamError, match="body") as caught:
        read_params(ImageParams, body)
    assert caught.value.field == "body"


def test_a_byte_order_mark_is_skipped() -> None:
    assert read_params(ImageParams, b'\xef\xbb\xbf{"seed": 5}').seed == 5


def test_two_classes_are_refused() -> None:
    with pytest.raises(ParamError, match="class_name"):
        read(class_id=1, class_name="goldfish")


@pytest.mark.parametrize("field", ["seed", "steps", "guidance_scale", "cache_interval"])
def test_a_row_out_of_range_is_refused_by_field(field: str) -> None:
    check_spec(RowSpec(0, MAX_SEED, 1, 0.0, "heun"))
    with pytest.raises(ValueError, match=field):
        check_spec(RowSpec(**{**vars(RowSpec(0, 0, 1, 1.0, "ddim")), field: 2**32}))


def test_the_schema_allows_null_where_it_is_taken() -> None:
    for name, field in ImageParams.model_json_schema()["properties"].items():
        assert {"type": "null"} in field["anyOf"], name


@pytest.mark.parametrize("asked", ["Cafe\u0301", "CAF\u00c9", "caf\u00e9", "\uff23af\u00e9"])
def test_a_class_is_found_in_every_unicode_form(asked: str) -> None:
    assert ClassNames(["tench", "caf\u00e9"], 2).ids(asked) == [1]


@pytest.mark.parametrize("name", ["istanbul", "\u0130stanbul"])
@pytest.mark.parametrize("asked", ["\u0130STANBUL", "I\u0307stanbul", "istanbul", "ISTANBUL"])
def test_a_dotted_capital_i_is_an_i(name: str, asked: str) -> None:
    assert ClassNames([name], 1).ids(asked) == [0]


def test_a_new_field_appears_in_every_interface() -> None:
    program = """
from pydantic import Field, create_model
from robuq_core import params
params.ImageParams = create_model(
    "ImageParams", __base__=params.ImageParams, sharpness=(float, Field(0.5, ge=0, le=3, description="How sharp.")))
from loadtest.workload import Workload
from robuq_core.cli import app
from robuq_core.params import ParamError, read_params
from server.openai_api import ImagesBody
from server.generate import GenerateBody

for body in (GenerateBody, ImagesBody):
    assert body.model_json_schema()["properties"]["sharpness"]["anyOf"][0]["maximum"] == 3
    required = {"prompt": "1"} if body is ImagesBody else {}
    assert read_params(body, {**required, "sharpness": 2.5}).sharpness == 2.5
    try:
        read_params(body, {**required, "sharpness": 3.5})
    except ParamError as error:
        assert error.field == "sharpness" and "from 0 to 3" in str(error)
    else:
        raise AssertionError
workload = Workload({"num_classes": 5, "image_size": 32, "samplers": ["ddim"], "guidance": True})
values = [body["sharpness"] for body in (workload.mixed() for _ in range(50)) if "sharpness" in body]
assert values and all(0 <= value <= 3 for value in values)
app(["sample", "--help"])
"""
    command, wide = [sys.executable, "-c", program], {**os.environ, "COLUMNS": "200"}
    done = subprocess.run(command, env=wide, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert re.search("--sharpness.*0<=x<=3", done.stdout)


def test_parameters_need_no_torch() -> None:
    program = "import sys, robuq_core.params; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], timeout=120, check=True)
