"""Every mistake in a configuration is one ConfigError, on one line, that names the key."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_run import REPOSITORY, make_config, write_config

from train.config import ConfigError, load_config
from train.logs import one_line


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"modle": {}}, "modle: unknown key"),
        ({"teacher": {"learning_rate": 1}}, "teacher.learning_rate: unknown key"),
        ({"model": {"width": 24}}, "model.width: unknown key"),
        ({"teacher": {"steps": "many"}}, "teacher.steps: .*integer"),
        ({"teacher": {"steps": 0}}, "teacher.steps: .*greater than or equal to 1"),
        ({"qat": {"lr": -1}}, "qat.lr: .*greater than 0"),
        ({"qat": {"betas": [0.9, 1.5]}}, "qat.betas.1: .*less than 1"),
        ({"qat": {"lr_schedule": "linear"}}, "qat.lr_schedule: .*'constant' or 'cosine'"),
        ({"seed": -1}, "seed: .*greater than or equal to 0"),
        ({"data": {"flip_probability": 2}}, "data.flip_probability: "),
        ({"diffusion": {"prediction_type": "noise"}}, "diffusion.prediction_type: .*'epsilon'"),
        ({"quant": {"activation_bits": 9}}, "quant.activation_bits: "),
        ({"model": {"in_channels": 4}}, "model.in_channels must be 1 .* or 3 .*, not 4"),
        ({"model": {"hidden_size": 52}}, "model.hidden_size 52 cannot be quantised: no Hadamard matrix"),
        ({"model": {"mlp_ratio": 5}}, "model.hidden_size 24 cannot be quantised: .* order 120"),
        ({"model": {"patch_size": 3}}, "model: .*patch_size 3"),
    ],
)
def test_a_bad_value_is_named(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        make_config(tmp_path, changes)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "run.yaml") in str(caught.value)


def test_every_bad_value_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"teacher\.lr: .*; qat\.steps: ") as caught:
        make_config(tmp_path, {"teacher": {"lr": 0}, "qat": {"steps": 0}})
    assert "\n" not in str(caught.value)


def test_a_missing_section_is_named(tmp_path: Path) -> None:
    path = tmp_path / "short.yaml"
    path.write_text("run_dir: run\ndata: {path: photos}\n")
    with pytest.raises(ConfigError, match="model: Field required"):
        load_config(path, [])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"model: [1", "cannot read the configuration"),
        (b"- a\n- b\n", "expected a mapping at the top level"),
        (b"", "expected a mapping at the top level"),
        (b"\xff\xfe\x00", "cannot read the configuration"),
        (None, "cannot read the configuration"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, content: bytes | None, expected: str) -> None:
    path = tmp_path / "broken.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=expected) as caught:
        load_config(path, [])
    assert "broken.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_overrides_are_yaml_values_by_dotted_key(tmp_path: Path) -> None:
    overrides = [
        "teacher.lr=3e-4",
        "teacher.grad_clip=null",
        "qat.betas=[0.8, 0.9]",
        "quant.bits={blocks.0.attn.qkv: 3}",
        "data.path=/data/a=b.zip",
        "seed=5",
        "compile=false",
    ]
    config = load_config(write_config(tmp_path), overrides)
    assert config.teacher.lr == 3e-4
    assert config.teacher.grad_clip is None
    assert config.qat.betas == (0.8, 0.9)
    assert config.quant.bits == {"blocks.0.attn.qkv": 3}
    assert config.data.path == Path("/data/a=b.zip")
    assert config.seed == 5
    assert config.compile is False


def test_an_override_reaches_into_an_empty_section(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    path.write_text(path.read_text().replace("sampler:\n  steps: 3\n", "sampler:\n"))
    assert load_config(path, ["sampler.steps=7"]).sampler.steps == 7


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("teacher.lr", "'teacher.lr' must look like section.key=value"),
        ("seed.x=1", "seed is not a section"),
        ("teacher.speed=1", "teacher.speed: unknown key"),
        ("=1", "unknown key"),
        ("teacher.lr=[1", "teacher.lr=.*not YAML"),
        ("teacher.lr=fast", "teacher.lr: "),
    ],
)
def test_a_bad_override_is_named(tmp_path: Path, override: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        load_config(write_config(tmp_path), [override])
    assert "\n" not in str(caught.value)


# ablations.yaml is a study of its own kind, which its own tests load.
SHIPPED = [path for path in sorted((REPOSITORY / "configs").glob("*.yaml")) if path.name != "ablations.yaml"]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_the_shipped_configurations_are_valid(path: Path) -> None:
    load_config(path, [])


@given(text=st.text(max_size=1000))
def test_quoted_messages_stay_on_one_short_line(text: str) -> None:
    quoted = one_line(RuntimeError(text), most=100)
    assert 0 < len(quoted) <= 100
    assert len(quoted.splitlines()) == 1
