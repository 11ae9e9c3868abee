"""deploy/kubernetes: valid by Kubernetes' own schemas, and at one with the server that it runs."""

from __future__ import annotations

import re
from typing import Any

import kubernetes_validate
import pytest
from deploy_harness import DEPLOY, Exposition
from kubernetes_harness import KUBERNETES, Document, build, load, pod_of
from kubernetes_validate.utils import all_versions
from packaging.version import Version
from pydantic import TypeAdapter
from serving_harness import live_server

from server.fake import FakeSampler
from server.lifecycle import DELIVERY_TIMEOUT_S
from server.settings import Settings

# Since when a container may sleep before it ends without a program for it.
OLDEST = "1.30"
VERSIONS = [version for version in all_versions() if Version(version) >= Version(OLDEST)]
BUILDS = {"base": ("base",), "gpu": ("gpu",), "keys": ("base", "keys"), "gpu and keys": ("gpu", "keys")}
# Of the Prometheus operator; Kubernetes has no schema of it.
FOREIGN = {"ServiceMonitor"}

BASE = build("base")
GUIDE = (DEPLOY.parent / "docs" / "deployment.md").read_text()
each_build = pytest.mark.parametrize("overlays", BUILDS.values(), ids=BUILDS)


def server_of(resources: dict[str, Document]) -> Document:
    (server,) = pod_of(resources)["containers"]
    assert isinstance(server, dict)
    return server


def environment(resources: dict[str, Document]) -> dict[str, Any]:
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in server_of(resources)["env"]}


def setting_of(resources: dict[str, Document], variable: str) -> Any:
    """What the server makes of a variable."""
    name = variable.removeprefix("ROBUQ_").lower()
    field = Settings.model_fields[name]
    return TypeAdapter(field.annotation).validate_python(environment(resources)[variable])


@pytest.mark.parametrize("version", [VERSIONS[0], VERSIONS[-1]])
def test_kubernetes_takes_every_manifest(version: str) -> None:
    seen: list[Document] = []
    for overlays in BUILDS.values():
        for document in build(*overlays).values():
            if document not in seen:
                assert document["kind"] not in FOREIGN
                kubernetes_validate.validate(document, version, strict=True)
                seen.append(document)
    assert len(seen) == len(BASE) + len(BUILDS) - 1, "each overlay changes the deployment alone"


def test_selectors_find_the_pods() -> None:
    template = BASE["Deployment"]["spec"]["template"]
    labels = template["metadata"]["labels"]
    assert BASE["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert BASE["Service"]["spec"]["selector"] == labels
    assert BASE["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert BASE["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels
    (spread,) = template["spec"]["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"] == labels
    scaled = BASE["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    deployment = BASE["Deployment"]
    assert scaled == {
        "apiVersion": deployment["apiVersion"],
        "kind": "Deployment",
        "name": deployment["metadata"]["name"],
    }
    assert "replicas" not in deployment["spec"], "an apply would undo what the autoscaler has done"


@each_build
def test_what_machines_ask_is_a_route(overlays: tuple[str, ...]) -> None:
    with live_server(FakeSampler()) as (client, _):
        routes = set(client.get("/openapi.json").json()["paths"])
    server = server_of(build(*overlays))
    probes = {name: server[name]["httpGet"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert {name: probe["path"] for name, probe in probes.items()} == {
        "startupProbe": "/ready",
        "readinessProbe": "/ready",
        "livenessProbe": "/health",
    }
    (endpoint,) = build("monitoring")["ServiceMonitor"]["spec"]["endpoints"]
    assert {endpoint["path"], *(probe["path"] for probe in probes.values())} <= routes
    assert {probe["port"] for probe in probes.values()} == {"http"}


@each_build
def test_variables_are_settings_with_values_that_they_take(overlays: tuple[str, ...]) -> None:
    resources = build(*overlays)
    settings = {f"ROBUQ_{name.upper()}" for name in Settings.model_fields}
    assert set(environment(resources)) <= settings
    for variable, value in environment(resources).items():
        if isinstance(value, str):
            setting_of(resources, variable)
    # The service's own variable would be ROBUQ_PORT=tcp://10.0.0.1:80.
    assert pod_of(resources)["enableServiceLinks"] is False


@each_build
def test_draining_ends_before_the_kill(overlays: tuple[str, ...]) -> None:
    resources = build(*overlays)
    asleep = server_of(resources)["lifecycle"]["preStop"]["sleep"]["seconds"]
    draining = float(setting_of(resources, "ROBUQ_DRAIN_TIMEOUT_S"))
    assert pod_of(resources)["terminationGracePeriodSeconds"] > asleep + draining + DELIVERY_TIMEOUT_S


@each_build
def test_it_runs_without_any_rights(overlays: tuple[str, ...]) -> None:
    resources = build(*overlays)
    pod, server = pod_of(resources), server_of(resources)
    assert pod["securityContext"]["runAsNonRoot"] is True
    user = re.search(r"^USER (\d+):(\d+)$", (KUBERNETES.parents[1] / "Dockerfile").read_text(), re.MULTILINE)
    assert user is not None
    given = pod["securityContext"]
    assert [given["runAsUser"], given["runAsGroup"], given["fsGroup"]] == [
        *map(int, (user[1], user[2], user[2])),
    ]
    assert given["seccompProfile"] == {"type": "RuntimeDefault"}
    assert server["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod["automountServiceAccountToken"] is False
    volumes = {volume["name"] for volume in pod["volumes"]}
    mounts = {mount["name"]: mount for mount in server["volumeMounts"]}
    assert set(mounts) == volumes
    assert mounts["tmp"]["mountPath"] == "/tmp"
    assert all(mount.get("readOnly") for name, mount in mounts.items() if name != "tmp")


def test_the_keys_lie_where_the_server_looks() -> None:
    resources = build("base", "keys")
    (mount,) = (mount for mount in server_of(resources)["volumeMounts"] if mount["name"] == "keys")
    assert environment(resources)["ROBUQ_API_KEYS_FILE"] == f"{mount['mountPath']}/keys.json"
    assert "subPath" not in mount
    (volume,) = (volume for volume in pod_of(resources)["volumes"] if volume["name"] == "keys")
    assert volume["secret"]["defaultMode"] & 0o047 == 0o040, "the server's group may read, others nothing"


def test_the_autoscaler_asks_for_what_the_adapter_tells(exposition: Exposition) -> None:
    asked = [metric["pods"]["metric"]["name"] for metric in BASE["HorizontalPodAutoscaler"]["spec"]["metrics"]]
    assert "robuq_requests_waiting" in asked
    (rule,) = load("monitoring/prometheus-adapter.yaml")["rules"]["custom"]
    selected = re.search(r'__name__=~"([^"]+)"', rule["seriesQuery"])
    assert selected is not None
    told = set()
    for series in exposition.labels:
        if re.fullmatch(selected[1], series):
            found = re.match(rule["name"]["matches"], series)
            assert found is not None
            told.add(rule["name"]["as"].replace("${1}", found[1]))
    assert set(asked) == told
    overrides = rule["resources"]["overrides"]
    assert all(f'{label}!=""' in rule["seriesQuery"] for label in overrides)
    assert {override["resource"] for override in overrides.values()} == {"namespace", "pod"}


def test_the_service_monitor_scrapes_the_service_under_the_job_of_the_alerts() -> None:
    (monitor,) = build("monitoring").values()
    wanted, service = monitor["spec"]["selector"]["matchLabels"], BASE["Service"]
    assert wanted
    assert wanted.items() <= service["metadata"]["labels"].items()
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
    # The operator names the job after the service.
    job = service["metadata"]["name"]
    assert f'up{{job="{job}"}}' in (KUBERNETES.parent / "prometheus" / "alerts.yml").read_text()
