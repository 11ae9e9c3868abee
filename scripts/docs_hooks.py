"""What MkDocs does not do by itself for ``docs/``: links into the repository, equations, tables made from the code.

The pages stay plain Markdown that also reads well in a repository browser; all this happens while the site is built.
"""

from __future__ import annotations

import html
import json
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

# Pages at the root of the repository that belong into the site; other files that pages link to are put beside them.
ROOT_PAGES = {"CHANGELOG.md": "changelog.md", "THIRD_PARTY.md": "licences.md"}
ROOT_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#|\.\./)(?=[^)\s]+\))")
OUTSIDE = re.compile(r"(?<=\]\()\.\./([^)#\s]+)")
MATH = re.compile(r"^```math\n(.*?)^```$|^\$\$(.+?)\$\$$", re.M | re.S)
DRAWING = re.compile(r"^!\[([^\]]*)\]\(([^)\s]+\.svg)\)$", re.M)
# How docstrings name other things; the reference shows their names.
ROLE = re.compile(r":(?:class|func|meth|mod|attr):<code>~?([^<]*)</code>")


def openapi() -> dict[str, Any]:
    """What a server gives at ``/openapi.json``; the model behind it is a stand-in with five classes."""
    from server.app import create_app
    from server.fake import FakeSampler
    from server.metrics import Metrics
    from server.pool import Pool
    from server.request import ModelInfo
    from server.settings import Settings
    from server.worker import describe

    sampler = FakeSampler()
    fields = describe(sampler) | {"path": Path(), "class_names": sampler.class_names, "defaults": sampler.defaults}

    class Documented(Pool):
        """Knows its model without a worker."""

        model = ModelInfo(**fields)  # type: ignore[assignment]

    settings = Settings.model_construct()
    return create_app(Documented(settings, Metrics(settings.max_batch_rows)), settings).openapi()


def _settings() -> str:
    """Every option of ``robuq-serve``."""
    from server.settings import Settings

    lines = ["| Option | Default | |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = "" if field.default in (None, ()) else f"`{field.default}`"
        lines.append(f"| `--{name.replace('_', '-')}` | {default} | {field.description} |")
    return "\n".join(lines)


def _configuration() -> str:
    from train.config import annotated_defaults

    return f"## Configuration\n\n```yaml\n{annotated_defaults()}```"


# What is written where a page has a mark.
GENERATED = {
    "<!-- openapi -->": lambda: "[Every route and schema](api/index.html)",
    "<!-- settings -->": _settings,
    "<!-- keys -->": _configuration,
}


def _root(config: MkDocsConfig) -> Path:
    return Path(config.config_file_path).parent


def _source(target: str) -> str:
    """Where a file of the repository lies in the site."""
    return ROOT_PAGES.get(target, f"source/{target}")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Put the files of the repository that pages link to, and the HTTP reference, into the site."""
    root = _root(config)
    for name, page in ROOT_PAGES.items():
        # Seen from docs/, where they now lie, their links lead out of it.
        text = ROOT_LINK.sub("../", (root / name).read_text())
        files.append(File.generated(config, page, content=text))
    wanted = {target for page in files.documentation_pages() for target in OUTSIDE.findall(page.content_string)}
    for target in sorted(wanted - set(ROOT_PAGES)):
        path = root / target
        if not path.is_file():
            raise PluginError(f"docs: a page links to ../{target}, which is not a file of the repository")
        files.append(File.generated(config, _source(target), abs_src_path=str(path)))
    # The page that a server has at /docs, and the document that it shows.
    web = root / "server" / "web"
    files.append(File.generated(config, "api/openapi.json", content=json.dumps(openapi())))
    files.append(File.generated(config, "api/index.html", abs_src_path=str(web / "reference.html")))
    for path in (*web.glob("*.js"), web / "style.css", web / "favicon.svg"):
        files.append(File.generated(config, f"api/web/{path.name}", abs_src_path=str(path)))
    return files


def _drawing(folder: Path, text: str, path: str) -> str:
    """A drawing whose lines have the colour of the text is set inline, so that it follows the reader's choice."""
    drawing = (folder / path).read_text()
    if "currentColor" not in drawing:
        return f"![{text}]({path})"
    drawing = re.sub(r"<style>.*?</style>|<!--.*?-->", "", drawing, flags=re.S)
    drawing = drawing.replace("<svg ", f'<svg aria-label="{html.escape(text)}" ', 1)
    return f'<figure class="drawing">{" ".join(drawing.split())}</figure>'


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links at those files, set equations and drawings, and write what has a mark."""
    here = posixpath.dirname(page.file.src_uri) or "."
    markdown = OUTSIDE.sub(lambda found: posixpath.relpath(_source(found.group(1)), here), markdown)
    markdown = MATH.sub(lambda found: convert(" ".join((found[1] or found[2]).split()), display="block"), markdown)
    folder = Path(config.docs_dir) / here
    markdown = DRAWING.sub(lambda found: _drawing(folder, found.group(1), found.group(2)), markdown)
    for mark, make in GENERATED.items():
        if mark in markdown:
            markdown = markdown.replace(mark, make())
    return markdown


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Take the roles off the names in docstrings."""
    return ROLE.sub(r"<code>\1</code>", content)
