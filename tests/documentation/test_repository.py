"""Links, versions and counts that several files of the repository repeat."""

from __future__ import annotations

import re
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
