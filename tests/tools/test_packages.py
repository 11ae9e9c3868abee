"""What an installation holds: licences of every package, lock files with hashes, and the bill of materials."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from scripts_loaded import script

import robuq_core

ROOT = Path(__file__).parents[2]
PLAIN, CUDA = ROOT / "requirements.lock", ROOT / "requirements-cuda.lock"
licences = script("licences")


def names(requirements: list[str]) -> set[str]:
    """Those that apply on this platform."""
    parsed = map(Requirement, requirements)
    return {canonicalize_name(r.name) for r in parsed if r.marker is None or r.marker.evaluate({"extra": ""})}


def listed() -> dict[str, tuple[str, set[str]]]:
    """The table of THIRD_PARTY.md: licence and users by package."""
    rows = [line.strip("|").split("|") for line in licences.TABLE.findall(licences.PAGE.read_text())[0].splitlines()]
    return {name.strip(): (text.strip(), set(users.strip().split(", "))) for name, text, users in rows[2:]}


def entries(path: Path) -> dict[str, tuple[str, list[str]]]:
    """Version and hashes by canonical name; each line of the file belongs to one, and none names an index."""
    found: dict[str, tuple[str, list[str]]] = {}
    for line in re.sub(r" \\\n +", " ", path.read_text()).splitlines():
        if not line.startswith(("#", "-r ")):
            requirement, *hashes = re.split(r" --hash=", line)
            parsed = Requirement(requirement)
            (pin,) = parsed.specifier
            assert pin.operator == "=="
            assert hashes, line
            assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", each) for each in hashes), line
            assert parsed.url is None
            found[canonicalize_name(parsed.name)] = pin.version, hashes
    return found


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().split()
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}


def test_every_dependency_is_listed_with_a_licence() -> None:
    """Direct or not, and those of development are not."""
    table, project = listed(), licences.PYPROJECT
    assert all(table[name][1] == {"always"} for name in names(project["dependencies"]))
    for extra in licences.EXTRAS:
        for name in names(project["optional-dependencies"][extra]):
            assert table[name][1] & {"always", extra}, (extra, name)
    installed = {name for extra in licences.EXTRAS for name, found in licences.needed(extra).items() if found}
    assert "starlette" in installed
    assert installed <= set(table)
    assert not {"ruff", "mkdocs", "robuq"} & installed
    assert not [name for name, (licence, _) in table.items() if not licence or licence == "unknown"]


def test_licences_come_from_the_metadata() -> None:
    assert licences.licence("no-such-package", None) == "unknown"
    assert licences.licence("numpy", licences.needed()["numpy"]).startswith("BSD-3-Clause")
    assert "| numpy | BSD-3-Clause" in licences.table()


def test_locked_versions_are_those_of_the_constraints() -> None:
    pinned, plain, cuda = constraints(), entries(PLAIN), entries(CUDA)
    assert not set(plain) & set(cuda)
    assert {name: version for name, (version, _) in plain.items()} == {name: pinned[name] for name in plain}
    assert all(cuda[name][0] == pinned[name] for name in ("torch", "triton"))
    assert set(cuda) - set(pinned) == {name for name in cuda if name.startswith(("nvidia-", "cuda-"))}
    for text in licences.BUILD_REQUIREMENTS:
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        assert str(requirement.specifier) == f"=={pinned[name]}" == f"=={plain[name][0]}"


def test_nothing_that_serving_needs_is_missing_from_the_locks() -> None:
    assert {*licences.needed(), *names(licences.PYPROJECT["dependencies"])} <= {*entries(PLAIN), "torch"}
    assert f"-r {PLAIN.name}\n" in CUDA.read_text()
    assert any(name.startswith("nvidia-cudnn") for name in entries(CUDA))


def test_the_bill_of_materials_has_the_hashes_of_the_lock_files(tmp_path: Path) -> None:
    """The commands of `make sbom`."""
    pytest.importorskip("cyclonedx_py")
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    recipe = (ROOT / "Makefile").read_text().split("\nsbom: $(VENV)/.dev-all\n")[1].split("\n\n")[0]
    out = tmp_path / "sbom.cdx.json"
    commands = recipe.replace("$(BIN)", str(Path(sys.executable).parent)).replace("$$", "$")
    subprocess.run(["sh", "-ec", commands.replace("dist", str(tmp_path))], cwd=ROOT, check=True, capture_output=True)
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(out.read_text()) is None
    bill = json.loads(out.read_text())
    assert bill["metadata"]["component"]["version"] == robuq_core.__version__
    components = {each["name"]: json.dumps(each) for each in bill["components"]}
    assert names(licences.PYPROJECT["dependencies"]) <= set(components)
    for path in (PLAIN, CUDA):
        for name, digest in re.findall(r"^([\w.-]+)==.*\n    --hash=sha256:(\w+)", path.read_text(), re.M):
            assert digest in components[name], name
