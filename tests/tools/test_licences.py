"""The table of licences is complete, and the bill of materials has every locked package with its hashes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from scripts_loaded import script

import robuq_core

ROOT = Path(__file__).parents[2]
licences = script("licences")


def names(requirements: list[str]) -> set[str]:
    """Those that apply on this platform."""
    parsed = map(Requirement, requirements)
    return {canonicalize_name(r.name) for r in parsed if r.marker is None or r.marker.evaluate({"extra": ""})}


def listed() -> dict[str, tuple[str, set[str]]]:
    """The table of THIRD_PARTY.md: licence and users by package."""
    rows = [line.strip("|").split("|") for line in licences.TABLE.findall(licences.PAGE.read_text())[0].splitlines()]
    return {name.strip(): (text.strip(), set(users.strip().split(", "))) for name, text, users in rows[2:]}


def test_every_dependency_is_listed_with_a_licence() -> None:
    table, project = listed(), licences.PYPROJECT
    for name in names(project["dependencies"]):
        assert table[name][1] == {"always"}, name
    for extra in licences.EXTRAS:
        for name in names(project["optional-dependencies"][extra]):
            assert table[name][1] & {"always", extra}, (extra, name)
    assert not [name for name, (licence, _) in table.items() if not licence or licence == "unknown"]


def test_indirect_dependencies_are_listed() -> None:
    installed = {name for extra in licences.EXTRAS for name, found in licences.needed(extra).items() if found}
    assert "starlette" in installed
    assert installed <= set(listed())
    assert not {"ruff", "mkdocs", "robuq"} & installed


def test_licences_come_from_the_metadata() -> None:
    assert licences.licence("no-such-package", None) == "unknown"
    assert licences.licence("numpy", licences.needed()["numpy"]).startswith("BSD-3-Clause")
    assert "| numpy | BSD-3-Clause" in licences.table()


def test_the_bill_of_materials_has_the_hashes_of_the_lock_files(tmp_path: Path) -> None:
    """The commands of `make sbom`."""
    recipe = (ROOT / "Makefile").read_text().split("\nsbom: $(VENV)/.dev-all\n")[1].split("\n\n")[0]
    out = tmp_path / "sbom.cdx.json"
    commands = (
        recipe.replace("$(BIN)", str(Path(sys.executable).parent)).replace("$$", "$").replace("dist", str(tmp_path))
    )
    subprocess.run(["sh", "-ec", commands], cwd=ROOT, check=True, capture_output=True)
    assert json.loads(out.read_text())["metadata"]["component"]["version"] == robuq_core.__version__
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(out.read_text()) is None
    components = {each["name"]: json.dumps(each) for each in json.loads(out.read_text())["components"]}
    assert names(licences.PYPROJECT["dependencies"]) <= set(components)
    for lock in ("requirements.lock", "requirements-cuda.lock"):
        for name, digest in re.findall(r"^([\w.-]+)==.*\n    --hash=sha256:(\w+)", (ROOT / lock).read_text(), re.M):
            assert digest in components[name], name
