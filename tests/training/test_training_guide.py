"""The training reference names every key of the configuration with its default, and every command and stage."""

import re
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from synthetic_run import REPOSITORY
from typer.main import get_command

from train.cli import app
from train.config import TrainConfig
from train.stages import STAGES

GUIDE = (REPOSITORY / "docs" / "training.md").read_text()
STAGED = ("teacher", "warmup", "qat")


def tables() -> dict[str, dict[str, str]]:
    """Key to default, by the heading of the table."""
    configuration = GUIDE.partition("## Configuration")[2]
    found = {}
    for part in configuration.split("\n### ")[1:]:
        heading, _, body = part.partition("\n")
        rows = re.findall(r"^\| `(\w+)`(?: \(`\w+`\))? \| (.*?) \|", body, re.MULTILINE)
        assert len(rows) == len(dict(rows))
        found[heading] = dict(rows)
    return found


def is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def default_of(model: type[BaseModel], key: str) -> Any:
    field = model.model_fields[key]
    default = field.get_default(call_default_factory=True, validated_data={})
    if default is PydanticUndefined:
        return "required"
    return list(default) if isinstance(default, tuple) else default


def sections() -> dict[str, type[BaseModel]]:
    fields = TrainConfig.model_fields.items()
    return {name: field.annotation for name, field in fields if is_section(field.annotation)}  # type: ignore[misc]


def test_the_top_level_is_complete() -> None:
    keys = {name for name, field in TrainConfig.model_fields.items() if not is_section(field.annotation)}
    table = tables()["Top level"]
    assert set(table) == keys
    for key, written in table.items():
        assert yaml.safe_load(written) == default_of(TrainConfig, key)


@pytest.mark.parametrize("name", [name for name in sections() if name not in STAGED])
def test_a_section_is_complete(name: str) -> None:
    model, table = sections()[name], tables()[f"`{name}`"]
    assert list(table) == list(model.model_fields)
    for key, written in table.items():
        assert yaml.safe_load(written) == default_of(model, key), key


def test_the_training_stages_are_complete() -> None:
    table = tables()["`teacher`, `warmup`, `qat`"]
    defaults = {name: TrainConfig.model_fields[name].default for name in STAGED}
    assert set(table) == set().union(*(type(section).model_fields for section in defaults.values()))
    for key, written in table.items():
        having = [section for section in defaults.values() if key in type(section).model_fields]
        values = [getattr(section, key) for section in having]
        expected = [list(value) if isinstance(value, tuple) else value for value in values]
        if any(value != expected[0] for value in expected):
            assert [yaml.safe_load(each) for each in written.split(", ")] == expected, key
        else:
            assert yaml.safe_load(written) == expected[0], key


def test_every_table_is_of_a_section() -> None:
    named = {name for heading in tables() for name in re.findall(r"`(\w+)`", heading)}
    assert named == set(sections())


def test_choices_are_spelled_out() -> None:
    for name, model in sections().items():
        heading = next(each for each in tables() if f"`{name}`" in each)
        body = GUIDE.partition(f"### {heading}")[2].partition("\n### ")[0]
        for key, field in model.model_fields.items():
            choices = [choice for choice in get_args(field.annotation) if isinstance(choice, str)]
            missing = [choice for choice in choices if choice not in body]
            assert not missing, f"{name}.{key}: {missing}"


def test_stages_and_their_files_are_named() -> None:
    rows = re.findall(r"^\| `(\w+)` \| .*? \| (.*?) \|", GUIDE.partition("## Stages")[2], re.MULTILINE)
    written = dict(rows)
    assert [name for name, _ in rows][: 1 + len(STAGES)] == ["prepare", *(stage.name for stage in STAGES)]
    for stage in STAGES:
        assert f"`{stage.writes}`" in written[stage.name]


def test_every_command_in_the_guide_exists() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    used = set(re.findall(r"robuq-train (\w+)", GUIDE))
    assert used <= set(commands)
    assert {"run", "prepare", *(stage.name for stage in STAGES)} <= set(commands)
