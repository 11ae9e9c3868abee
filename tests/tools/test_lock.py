"""requirements.lock and requirements-cuda.lock: they agree with constraints.txt and are complete."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from scripts_loaded import script

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PLAIN, CUDA = ROOT / "requirements.lock", ROOT / "requirements-cuda.lock"


def entries(path: Path) -> dict[str, tuple[str, list[str]]]:
    """Version and hashes by canonical name; each line of the file belongs to one."""
    found: dict[str, tuple[str, list[str]]] = {}
    text = re.sub(r" \\\n +", " ", path.read_text())
    for line in text.splitlines():
        if line.startswith(("#", "-r ")):
            continue
        requirement, *hashes = re.split(r" --hash=", line)
        parsed = Requirement(requirement)
        (pin,) = parsed.specifier
        assert pin.operator == "==", line
        assert hashes, line
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", each) for each in hashes), line
        found[canonicalize_name(parsed.name)] = (pin.version, hashes)
    return found


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().split()
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}


def test_versions_are_those_of_the_constraints() -> None:
    pinned = constraints()
    plain, cuda = entries(PLAIN), entries(CUDA)
    assert not set(plain) & set(cuda)
    assert {name: version for name, (version, _) in plain.items()} == {name: pinned[name] for name in plain}
    for name in ("torch", "triton"):
        assert cuda[name][0] == pinned[name]
    assert set(cuda) - set(pinned) == {name for name in cuda if name.startswith(("nvidia-", "cuda-"))}


def test_nothing_that_serving_needs_is_missing() -> None:
    needed = script("licences").needed()
    assert set(needed) <= {*entries(PLAIN), "torch"}
    direct = {canonicalize_name(Requirement(text).name) for text in PROJECT["project"]["dependencies"]}
    assert direct <= {*entries(PLAIN), "torch"}


def test_the_cuda_file_is_complete() -> None:
    assert f"-r {PLAIN.name}\n" in CUDA.read_text()
    assert any(name.startswith("nvidia-cudnn") for name in entries(CUDA))


def test_what_builds_the_package_is_pinned() -> None:
    pinned = constraints()
    for text in PROJECT["build-system"]["requires"]:
        requirement = Requirement(text)
        assert str(requirement.specifier) == f"=={pinned[canonicalize_name(requirement.name)]}"
        assert entries(PLAIN)[canonicalize_name(requirement.name)][0] == pinned[canonicalize_name(requirement.name)]


def test_no_file_names_an_index() -> None:
    for path in (PLAIN, CUDA):
        assert not re.search(r"https?:|file:|--index|--find-links", path.read_text())
