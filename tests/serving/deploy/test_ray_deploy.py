"""deploy/ray and what docs/deployment.md says of it, against the application."""

from __future__ import annotations

import re

import pytest
import yaml
from deploy_harness import DEPLOY, Exposition

pytest.importorskip("ray.serve")

from ray.serve.schema import ServeDeploySchema

from server.ray_app import ClusterSettings, app
from server.ray_support import TwoChoices, scale_on_images
from server.settings import Settings

CONFIG = yaml.safe_load((DEPLOY / "ray" / "serve.yaml").read_text())
PROMETHEUS = yaml.safe_load((DEPLOY / "ray" / "prometheus.yml").read_text())
GUIDE = (DEPLOY.parent / "docs" / "deployment.md").read_text()
OWN = {name: field for name, field in ClusterSettings.model_fields.items() if name not in Settings.model_fields}


def cluster_table() -> str:
    rows = ["| Argument | Default | |", "|---|---|---|"]
    for name, field in OWN.items():
        default = "" if field.default is None else f"`{field.default:g}`"
        rows.append(f"| `{name}` | {default} | {field.description} |")
    return "\n".join(rows) + "\n"


def test_the_guide_tells_every_argument() -> None:
    told = re.search(r"<!-- cluster settings -->\n(.*?)<!-- end -->", GUIDE, re.S)
    assert told is not None
    assert told[1] == cluster_table()


def test_serve_takes_the_file() -> None:
    (application,) = ServeDeploySchema.model_validate(CONFIG).applications
    module, _, name = application.import_path.partition(":")
    assert (module, name) == (app.__module__, app.__name__)
    settings = ClusterSettings.model_validate(application.args)
    assert settings.max_replicas == application.args["max_replicas"]
    # It listens on every address: nobody may use it without a key.
    assert settings.api_keys_file is not None or CONFIG["http_options"]["host"] == "127.0.0.1"
    # Those that are commented out are settings, too.
    for name in re.findall(r"^ +# (\w+): ", (DEPLOY / "ray" / "serve.yaml").read_text(), re.M):
        assert name in ClusterSettings.model_fields


def test_arguments_come_as_text_from_the_command_line() -> None:
    settings = ClusterSettings.model_validate({"max_replicas": "8", "cpus": "4", "max_batch_rows": "64"})
    assert (settings.max_replicas, settings.cpus, settings.max_batch_rows) == (8, 4.0, 64)
    for command in re.findall(r"^serve run server\.ray_app:app ([^\n#]*)", GUIDE, re.M):
        ClusterSettings.model_validate(dict(argument.split("=", 1) for argument in command.split()))


def test_variables_are_read_where_the_command_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROBUQ_MAX_REPLICAS", "9")
    monkeypatch.setenv("ROBUQ_STALL_TIMEOUT_S", "7")
    settings = ClusterSettings.model_validate({"max_batch_rows": "8"})
    assert (settings.max_replicas, settings.stall_timeout_s) == (9, 7.0)
    given = settings.of_a_replica()
    monkeypatch.setenv("ROBUQ_STALL_TIMEOUT_S", "8")
    monkeypatch.setenv("ROBUQ_CHECKPOINT", "/elsewhere")
    assert Settings(**given).stall_timeout_s == 7.0, "a replica does not look at its own node's variables"
    assert Settings(**given).checkpoint is None


def test_the_deployment_is_as_the_settings_ask_for() -> None:
    settings = ClusterSettings(min_replicas=2, max_replicas=6, cpus=3, gpus=1, max_batch_rows=8, max_queue_images=99)
    deployment = app(settings)._bound_deployment
    assert deployment.ray_actor_options == {"num_cpus": 3.0, "num_gpus": 1.0}
    assert deployment.max_ongoing_requests == 16
    assert deployment.max_queued_requests == 99
    router = deployment._deployment_config.request_router_config
    assert issubclass(router.get_request_router_class(), TwoChoices)
    scaling = deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (2, 6)
    assert scaling.target_ongoing_requests == pytest.approx(0.7 * 4)
    assert scaling.policy.get_policy().__name__ == scale_on_images.__name__
    assert deployment._deployment_config.graceful_shutdown_timeout_s > settings.drain_timeout_s


def relabelled(name: str, replica: str) -> tuple[str, str]:
    """The name and the instance that a series of Ray's exporter gets."""
    labels = {"__name__": name, "replica": replica, "instance": "node:1234"}
    for rule in PROMETHEUS["scrape_configs"][0]["metric_relabel_configs"]:
        value = ";".join(labels[source] for source in rule["source_labels"])
        found = re.fullmatch(rule["regex"], value)
        if found:
            labels[rule["target_label"]] = found[1]
    return labels["__name__"], labels["instance"]


def test_prometheus_gives_the_series_their_names_back(exposition: Exposition) -> None:
    for name in exposition.labels:
        if name.startswith("robuq_"):
            assert relabelled(f"ray_{name}", "robuq#a1") == (name, "robuq#a1")
    assert relabelled("ray_node_cpu_count", "") == ("ray_node_cpu_count", "node:1234")
    assert [job["job_name"] for job in PROMETHEUS["scrape_configs"]] == ["robuq"]
    (rules,) = PROMETHEUS["rule_files"]
    assert (DEPLOY / "ray" / rules).resolve() == DEPLOY / "prometheus" / "alerts.yml"
