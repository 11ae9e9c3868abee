"""deploy/kubernetes as kustomize would build it: only what the overlays there use of its merging."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import yaml
from deploy_harness import DEPLOY

KUBERNETES = DEPLOY / "kubernetes"

Document = dict[str, Any]


def load(path: str) -> Document:
    """The only document of a file below deploy/kubernetes."""
    (document,) = yaml.safe_load_all((KUBERNETES / path).read_text())
    assert isinstance(document, dict)
    return document


def build(*overlays: str) -> dict[str, Document]:
    """Every resource by its kind, with the patches of all ``overlays`` and the images of the last that names some."""
    files: list[str] = []
    patches: list[str] = []
    images: list[Document] = []
    for overlay in overlays:
        kustomization = load(f"{overlay}/kustomization.yaml")
        assert set(kustomization) <= {"apiVersion", "kind", "resources", "patches", "images"}, overlay
        for resource in kustomization.get("resources", []):
            if resource.startswith("../"):
                base = resource.removeprefix("../")
                files += [f"{base}/{name}" for name in load(f"{base}/kustomization.yaml")["resources"]]
            else:
                files.append(f"{overlay}/{resource}")
        patches += [f"{overlay}/{patch['path']}" for patch in kustomization.get("patches", [])]
        images = kustomization.get("images", images)
    resources = {document["kind"]: document for document in map(load, files)}
    for patch in map(load, patches):
        merged = resources[patch["kind"]]
        assert patch["metadata"]["name"] == merged["metadata"]["name"]
        resources[patch["kind"]] = _merge(merged, patch)
    for image in images:
        for container in pod_of(resources)["containers"]:
            if container["image"] == image["name"]:
                container["image"] = f"{image['newName']}:{image['newTag']}"
    return resources


def pod_of(resources: dict[str, Document]) -> Document:
    """The pod's spec within the deployment."""
    pod: Document = resources["Deployment"]["spec"]["template"]["spec"]
    return pod


def _merge(old: Any, new: Any) -> Any:
    """A strategic merge: mappings by key, lists of named things by name (mounts by their path), others replaced."""
    if isinstance(old, dict) and isinstance(new, dict):
        return {key: _merge(old.get(key), new[key]) if key in new else deepcopy(old[key]) for key in {**old, **new}}
    if isinstance(old, list) and isinstance(new, list) and all("name" in item for item in [*old, *new]):
        key = "mountPath" if "mountPath" in new[0] else "name"
        merged = {item[key]: item for item in old}
        for item in new:
            merged[item[key]] = _merge(merged.get(item[key]), item)
        return list(merged.values())
    return deepcopy(new)
