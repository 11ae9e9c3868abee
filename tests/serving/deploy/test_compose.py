"""deploy/compose.yaml read as Compose would read it, for where there is no Docker to run it."""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import Any

import pytest
import yaml
from deploy_harness import DEPLOY

from server.settings import Settings

COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
# Keys of a service in the Compose specification, as far as they are used here: a misspelt one must not pass.
KNOWN = {
    *("build", "image", "command", "environment", "ports", "volumes", "depends_on", "restart", "read_only", "tmpfs"),
    *("cap_drop", "security_opt", "stop_grace_period", "user", "mem_limit", "pids_limit"),
}


def test_the_services() -> None:
    assert set(SERVICES) == {"server", "prometheus", "grafana"}
    assert set(COMPOSE) <= {"name", "services", "volumes"}
    for service in SERVICES.values():
        assert set(service) <= KNOWN
        assert set(service.get("depends_on", [])) <= set(SERVICES)


@pytest.mark.parametrize("name", ["prometheus", "grafana"])
def test_images_are_of_one_version(name: str) -> None:
    """Unless a variable names another, say by its digest."""
    image = re.fullmatch(r"\$\{(\w+):-([^}]+)\}", SERVICES[name]["image"])
    assert image is not None
    assert image[1] == f"{name.upper()}_IMAGE"
    assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+", image[2])


@pytest.mark.parametrize("name", SERVICES)
def test_every_container_has_as_few_rights_as_the_server(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["tmpfs"] == ["/tmp"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert re.fullmatch(r"\d+[gm]", service["mem_limit"])
    assert 0 < service["pids_limit"] <= 1000
    assert not {"privileged", "cap_add", "devices", "network_mode", "pid"} & set(service)
    if "build" not in service:  # the server's user is its image's
        assert int(service["user"].split(":")[0]) > 0


@pytest.mark.parametrize("name", SERVICES)
def test_ports_are_open_to_this_machine_alone(name: str) -> None:
    for port in SERVICES[name]["ports"]:
        assert re.fullmatch(r"127\.0\.0\.1:(\d+):\1", port)


@pytest.mark.parametrize("name", SERVICES)
def test_what_is_mounted_exists(name: str) -> None:
    for mount in SERVICES[name].get("volumes", []):
        source, target, *mode = mount.split(":")
        assert target.startswith("/")
        if source.startswith("."):
            assert (DEPLOY / source).exists(), source
            assert mode == ["ro"]
        else:
            assert source in COMPOSE["volumes"]


def test_the_server_is_built_from_the_repository() -> None:
    server = SERVICES["server"]
    assert set(server["build"]) == {"context", "args"}
    dockerfile = (DEPLOY / server["build"]["context"] / "Dockerfile").read_text()
    for argument, default in server["build"]["args"].items():
        assert f"\nARG {argument}={default.partition(':-')[2][:-1]}\n" in dockerfile
    settings = {f"ROBUQ_{name.upper()}" for name in Settings.model_fields}
    assert set(server["environment"]) <= settings


def has_compose() -> bool:
    if shutil.which("docker") is None:
        return False
    return subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0


@pytest.mark.skipif(not has_compose(), reason="Docker's plugin compose is not installed")
def test_compose_takes_the_file() -> None:
    command = ["docker", "compose", "-f", str(DEPLOY / "compose.yaml"), "config", "--quiet"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_draining_ends_before_docker_kills() -> None:
    grace = int(SERVICES["server"]["stop_grace_period"].removesuffix("s"))
    assert grace > Settings.model_fields["drain_timeout_s"].default


def test_prometheus_scrapes_the_service() -> None:
    (job,) = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["server:8000"]}]
    assert SERVICES["server"]["ports"][0].endswith(":8000")
    assert "./prometheus:/etc/prometheus:ro" in SERVICES["prometheus"]["volumes"]
    assert "--config.file=/etc/prometheus/prometheus.yml" in SERVICES["prometheus"]["command"]


def test_nobody_logs_in_to_grafana_with_a_default_password() -> None:
    environment = SERVICES["grafana"]["environment"]
    assert environment["GF_AUTH_DISABLE_LOGIN_FORM"] == "true"
    assert environment["GF_AUTH_BASIC_ENABLED"] == "false"
    assert environment["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"
