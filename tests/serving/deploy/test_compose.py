"""deploy/compose.yaml read as Compose would read it, for where there is no Docker to run it."""

from __future__ import annotations

import re
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


@pytest.mark.parametrize("name", SERVICES)
def test_a_container_has_few_rights_and_no_port_for_others(name: str) -> None:
    service = SERVICES[name]
    assert set(service) <= KNOWN
    assert (service["read_only"], service["tmpfs"], service["cap_drop"]) == (True, ["/tmp"], ["ALL"])
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert re.fullmatch(r"\d+[gm]", service["mem_limit"])
    assert 0 < service["pids_limit"] <= 1000
    if "build" not in service:  # the server's user is its image's
        assert int(service["user"].split(":")[0]) > 0
        assert re.fullmatch(rf"\${{{name.upper()}_IMAGE:-[\w./-]+:v?\d+\.\d+\.\d+}}", service["image"])
    for port in service["ports"]:
        assert re.fullmatch(r"127\.0\.0\.1:(\d+):\1", port)
    for mount in service.get("volumes", []):
        source, _, *mode = mount.split(":")
        assert (DEPLOY / source).exists() and mode == ["ro"] if source.startswith(".") else source in COMPOSE["volumes"]


def test_the_server_is_built_from_the_repository_and_may_drain() -> None:
    server = SERVICES["server"]
    dockerfile = (DEPLOY / server["build"]["context"] / "Dockerfile").read_text()
    for argument, default in server["build"]["args"].items():
        assert f"\nARG {argument}={default.partition(':-')[2][:-1]}\n" in dockerfile
    assert int(server["stop_grace_period"].removesuffix("s")) > Settings.model_fields["drain_timeout_s"].default


def test_prometheus_scrapes_it_and_grafana_has_no_default_password() -> None:
    (job,) = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["server:8000"]}]
    assert "--config.file=/etc/prometheus/prometheus.yml" in SERVICES["prometheus"]["command"]
    environment = SERVICES["grafana"]["environment"]
    assert environment["GF_AUTH_DISABLE_LOGIN_FORM"] == "true"
    assert environment["GF_AUTH_BASIC_ENABLED"] == "false"
    assert environment["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"
