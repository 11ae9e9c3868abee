"""The Grafana dashboard: every expression is of series that a server tells, and every panel has its own place."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import yaml
from deploy_harness import DASHBOARD, DEPLOY, Exposition, expressions

PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
GRAPHS = [panel for panel in PANELS if panel["type"] != "row"]
GRID_COLUMNS = 24


@pytest.mark.parametrize("panel", GRAPHS, ids=lambda panel: panel["title"])
def test_a_panel_shows_what_a_server_tells(panel: dict[str, Any], exposition: Exposition) -> None:
    for expression, target in zip(expressions(panel), panel["targets"], strict=True):
        exposition.check(expression)
        for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
            assert label in exposition.labels_of(expression), f"{panel['title']}: no {label} is left to show"


def test_ids_are_unique_and_no_two_panels_overlap() -> None:
    ids = [panel["id"] for panel in PANELS]
    assert len(set(ids)) == len(ids)
    for panel in PANELS:
        place = panel["gridPos"]
        assert place["w"] > 0
        assert place["h"] > 0
        assert 0 <= place["x"] <= GRID_COLUMNS - place["w"]
        assert place["y"] >= 0
    for one, other in itertools.combinations((panel["gridPos"] for panel in PANELS), 2):
        apart = (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        )
        assert apart, f"{one} and {other}"


def test_grafana_finds_the_dashboard_and_prometheus() -> None:
    provisioning = DEPLOY / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"]
    assert (source["type"], source["url"], source["isDefault"]) == ("prometheus", "http://prometheus:9090", True)
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "robuq.yaml").read_text())["providers"]
    mounts = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["grafana"]["volumes"]
    assert f"./grafana/dashboard.json:{provider['options']['path']}/robuq.json:ro" in mounts
