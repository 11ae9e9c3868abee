"""Alert rules: they parse, name only what a server tells, and each has a place in the runbook."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from deploy_harness import DEPLOY, Exposition

PROMETHEUS = DEPLOY / "prometheus"
RULES: list[dict[str, Any]] = [
    rule for group in yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"] for rule in group["rules"]
]
NAMES = [rule["alert"] for rule in RULES]

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")


def anchors(markdown: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", markdown.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_a_rule_names_only_what_a_server_tells(rule: dict[str, Any], exposition: Exposition) -> None:
    exposition.check(rule["expr"])


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_a_rule_says_how_urgent_it_is_and_where_to_read_on(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("page", "ticket")
    assert "for" in rule
    assert "{{ $labels.instance }}" in rule["annotations"]["summary"]
    page, _, anchor = rule["annotations"]["runbook"].partition("#")
    assert anchor in anchors(DEPLOY.parent / page)


def test_every_alert_is_named_once_and_played_through() -> None:
    assert len(set(NAMES)) == len(NAMES)
    cases = yaml.safe_load((PROMETHEUS / "alerts_test.yml").read_text())["tests"]
    played = {check["alertname"] for case in cases for check in case["alert_rule_test"] if check.get("exp_alerts")}
    assert played == set(NAMES)


def test_every_series_that_is_played_exists(exposition: Exposition) -> None:
    cases = yaml.safe_load((PROMETHEUS / "alerts_test.yml").read_text())["tests"]
    for series in {entry["series"].partition("{")[0] for case in cases for entry in case["input_series"]}:
        assert series in exposition.labels


@needs_promtool
@pytest.mark.parametrize(
    "command",
    [("check", "config", "prometheus.yml"), ("check", "rules", "alerts.yml"), ("test", "rules", "alerts_test.yml")],
    ids=" ".join,
)
def test_promtool_agrees(command: tuple[str, ...]) -> None:
    result = subprocess.run(["promtool", *command], cwd=PROMETHEUS, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
