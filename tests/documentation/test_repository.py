"""Links, versions, workflows and the release script: what the files of the repository say of each other."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

import robuq_core

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
TEXTS = [*PAGES, *ROOT.glob("*.md"), *(ROOT / "examples").glob("*.md"), *(ROOT / ".github").rglob("*.md")]
HEADING = re.compile(r"^#+ (.*)$", re.M)


def anchors(path: Path) -> set[str]:
    """Of a page's headings, as repository browsers and the site form them."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in HEADING.findall(text)}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path: Path) -> None:
    for target, anchor in re.findall(r"\]\((?![a-z]+:)([^)#\s]*)#?([^)\s]*)\)", path.read_text()):
        file = path.parent / target if target else path
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), f"{target}#{anchor}"


def test_every_page_is_in_the_navigation() -> None:
    config = (ROOT / "mkdocs.yml").read_text()
    for page in PAGES:
        assert re.search(rf": {re.escape(page.name)}$", config, re.M), page.name


def test_pages_that_the_sources_name_exist() -> None:
    files = [path for folder in ("robuq_core", "server", "train", "configs", "deploy", "scripts", "bench")
             for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".yaml", ".yml")]  # fmt: skip
    for path in [*files, ROOT / "Dockerfile", ROOT / "Makefile"]:
        for page, anchor in re.findall(r"\b(docs/[\w-]+\.md)#?([\w-]*)", path.read_text()):
            assert (ROOT / page).exists(), f"{path.relative_to(ROOT)}: {page}"
            assert not anchor or anchor in anchors(ROOT / page), f"{path.relative_to(ROOT)}: {page}#{anchor}"


def test_the_version_is_the_same_everywhere() -> None:
    version = robuq_core.__version__
    released = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert released[0] == version
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version


@pytest.mark.slow
@pytest.mark.skipif(find_spec("check_jsonschema") is None, reason="needs check-jsonschema")
@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("github-workflows", ".github/workflows/*.yml"),
        ("github-issue-forms", ".github/ISSUE_TEMPLATE/[!c]*.yml"),
        ("github-issue-config", ".github/ISSUE_TEMPLATE/config.yml"),
        ("citation-file-format", "CITATION.cff"),
    ],
)
def test_files_of_the_forge_fit_their_schemas(schema: str, files: str) -> None:
    paths = sorted(ROOT.glob(files))
    assert paths
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", *paths]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_workflows_run_what_exists() -> None:
    """Their commands are targets of the Makefile and scripts of ours; the oldest Python is the package's."""
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    jobs |= yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())["jobs"]
    commands = "\n".join(step.get("run", "") for job in jobs.values() for step in job["steps"])
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert {"test", "test-all"} <= set(re.findall(r"make ([\w-]+)", commands)) <= targets
    for script in re.findall(r"scripts/[\w.-]+", commands):
        assert os.access(ROOT / script, os.X_OK), script
    oldest = re.search(r'requires-python = ">=(.*)"', (ROOT / "pyproject.toml").read_text())
    assert oldest is not None
    assert jobs["test"]["strategy"]["matrix"]["python"][0] == oldest[1]


@pytest.mark.parametrize(("tag", "code"), [(f"v{robuq_core.__version__}", 0), ("v9.9.9", 2)])
def test_a_release_has_the_version_of_the_package(tag: str, code: int, tmp_path: Path) -> None:
    for name in ("scripts/release.sh", "robuq_core/__init__.py", "CHANGELOG.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / name)
    environment = {**os.environ, "CHECK_ONLY": "1", "GIT_DIR": str(tmp_path / ".git")}
    for command in (["git", "init", "--quiet"], ["git", "config", "status.showUntrackedFiles", "no"]):
        subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    done = subprocess.run([tmp_path / "scripts/release.sh", tag], env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
