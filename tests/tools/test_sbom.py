"""The bill of materials and the list of licences are complete."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from scripts_loaded import script

from robuq_core.errors import UserError
from robuq_core.hub import bundled_checkpoint

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def sbom() -> ModuleType:
    return script("sbom")


def names(requirements: list[str]) -> set[str]:
    """Those that hold on this platform."""
    parsed = map(Requirement, requirements)
    return {canonicalize_name(r.name) for r in parsed if r.marker is None or r.marker.evaluate({"extra": ""})}


def listed() -> dict[str, tuple[str, set[str]]]:
    """The table of THIRD_PARTY.md: licence and users by package."""
    text = (ROOT / "THIRD_PARTY.md").read_text().partition("<!-- packages -->")[2].partition("<!-- end -->")[0]
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in text.splitlines()[3:]]
    return {name: (licence, set(users.split(", "))) for name, licence, users in rows}


def test_every_dependency_is_in_the_list_with_a_licence(sbom: ModuleType) -> None:
    table = listed()
    for name in names(PROJECT["dependencies"]):
        assert table[name][1] == {"always"}, name
    for extra in sbom.extras_for_users():
        for name in names(PROJECT["optional-dependencies"][extra]):
            assert table[name][1] == {"always"} or extra in table[name][1], (extra, name)
    assert not [name for name, (licence, _) in table.items() if not licence or licence == "unknown"]


def test_the_list_is_that_of_what_is_installed(sbom: ModuleType) -> None:
    """Also what comes along indirectly. `python scripts/sbom.py --third-party THIRD_PARTY.md` mends it."""
    installed = {name for extra in sbom.extras_for_users() for name, found in sbom.needed([extra]).items() if found}
    assert installed <= set(listed())
    assert "starlette" in installed, "an indirect one"
    assert not {"pytest-of-nobody", "ruff", "mkdocs", "robuq"} & installed


def test_the_bill_of_materials(sbom: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "sbom.cdx.json"
    monkeypatch.setattr(sys, "argv", ["sbom.py", "--out", str(out)])
    assert sbom.main() == 0
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(out.read_text()) is None
    document = json.loads(out.read_text())
    assert document["metadata"]["component"]["name"] == "robuq"
    components = {canonicalize_name(c["name"]): c for c in document["components"]}
    references = {c["bom-ref"] for c in (*components.values(), document["metadata"]["component"])}
    (model,) = [components.pop(name) for name in list(components) if components[name]["type"] != "library"]
    assert names(PROJECT["dependencies"]) <= set(components)
    assert set(components) == set(sbom.needed())
    assert all(c["version"] and c["purl"].startswith("pkg:pypi/") for c in components.values())
    # Local builds are in no registry.
    without = {name for name, component in components.items() if not component.get("hashes")}
    assert without <= {name for name in components if "+" in components[name]["version"]}
    content = bundled_checkpoint().read_bytes()
    assert model["hashes"] == [{"alg": "SHA-256", "content": hashlib.sha256(content).hexdigest()}]
    assert {d["ref"] for d in document["dependencies"]} == references
    assert all(set(d["dependsOn"]) <= references for d in document["dependencies"])


def test_what_is_not_installed_has_no_bill(sbom: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sbom.PYPROJECT["optional-dependencies"], "fid", ["no-such-package-at-all"])
    with pytest.raises(UserError, match="no-such-package-at-all"):
        sbom.bill(["fid"])


def test_licences_are_told_or_stated(sbom: ModuleType) -> None:
    assert sbom.licence("no-such-package", None) == "unknown"
    assert sbom.licence("numpy", sbom.needed()["numpy"]).startswith("BSD-3-Clause")


def test_a_file_without_the_table_is_one_line(
    sbom: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "list.md"
    path.write_text("nothing\n")
    monkeypatch.setattr(sys, "argv", ["sbom.py", "--third-party", str(path)])
    assert sbom.main() == 2
    assert "no table between" in capsys.readouterr().err
    assert path.read_text() == "nothing\n"


def test_the_command_writes_what_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "THIRD_PARTY.md").write_text((ROOT / "THIRD_PARTY.md").read_text().replace("| always |", "| never |"))
    words = ["--third-party", tmp_path / "THIRD_PARTY.md", "--out", tmp_path / "sbom.cdx.json"]
    done = subprocess.run([sys.executable, "scripts/sbom.py", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "THIRD_PARTY.md").read_text()
    assert "| always |" in text
    assert "| never |" not in text
    assert (
        text.partition("<!-- packages -->")[0]
        == (ROOT / "THIRD_PARTY.md").read_text().partition("<!-- packages -->")[0]
    )
    assert json.loads((tmp_path / "sbom.cdx.json").read_text())["bomFormat"] == "CycloneDX"
