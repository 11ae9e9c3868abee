"""What ``robuq-train keys`` and docs/training.md say of the configuration and the stages, against the code."""

import re

import yaml
from synthetic_run import REPOSITORY
from typer.main import get_command
from typer.testing import CliRunner

from robuq_core.config import StrictModel
from train.cli import app
from train.config import TrainConfig
from train.stages import STAGES

GUIDE = (REPOSITORY / "docs" / "training.md").read_text()


def test_the_printed_keys_are_the_defaults() -> None:
    result = CliRunner().invoke(app, ["keys"])
    assert result.exit_code == 0
    tree = yaml.safe_load(result.output)
    tree["data"]["vae"] = "vae"  # the default model is one of latents
    required = {"run_dir": "REQUIRED", "model": {}, "data": {"path": "REQUIRED", "vae": "vae"}}
    assert TrainConfig.model_validate(tree) == TrainConfig.model_validate(required)
    assert set(tree) == set(TrainConfig.model_fields)


def test_every_key_has_a_meaning() -> None:
    sections = [StrictModel, *(field.annotation for field in TrainConfig.model_fields.values())]
    for section in sections:
        if isinstance(section, type) and issubclass(section, StrictModel):
            for name, field in section.model_fields.items():
                assert field.description, f"{section.__name__}.{name}"


def test_stages_and_their_files_are_named() -> None:
    rows = re.findall(r"^\| `(\w+)` \| .*? \| (.*?) \|", GUIDE.partition("## Stages")[2], re.MULTILINE)
    written = dict(rows)
    assert [name for name, _ in rows][: 1 + len(STAGES)] == ["prepare", *(stage.name for stage in STAGES)]
    for stage in STAGES:
        assert f"`{stage.writes}`" in written[stage.name]
    assert {"run", "prepare", *(stage.name for stage in STAGES)} <= set(get_command(app).commands)  # type: ignore[attr-defined]
