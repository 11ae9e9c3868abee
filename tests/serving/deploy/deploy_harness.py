"""What the tests of deploy/ share: all that PromQL may name, since a server really tells it."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import promql_parser
from prometheus_client.parser import text_string_to_metric_families

DEPLOY = Path(__file__).parents[3] / "deploy"

DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())
# What Grafana puts in for its variables.
_VARIABLES = {"$__rate_interval": "1m", "$__range": "1h", "$instance": ".*"}

# Added by Prometheus to each series that it scrapes, and the one that it makes of each scrape.
SCRAPE_LABELS = ("instance", "job")
SCRAPE_SERIES = ("up",)


@dataclass
class Exposition:
    """Names of series; for each its label names, and for each label the values seen."""

    labels: defaultdict[str, defaultdict[str, set[str]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(set))
    )

    @classmethod
    def parse(cls, text: str) -> Exposition:
        found = cls()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                series = found.labels[sample.name]
                for label, value in sample.labels.items():
                    series[label].add(value)
        for name in (*SCRAPE_SERIES, *found.labels):
            for label in SCRAPE_LABELS:
                found.labels[name][label].add("robuq" if label == "job" else "server:8000")
        return found

    def check(self, expression: str) -> None:
        """Fail unless ``expression`` parses and names only series, labels and values of labels that there are."""
        tree = promql_parser.parse(expression)
        selectors = [node for node in nodes(tree) if isinstance(node, promql_parser.VectorSelector)]
        assert selectors, f"{expression} selects nothing"
        known = set()
        for selector in selectors:
            assert selector.name in self.labels, f"no server tells {selector.name}"
            series = self.labels[selector.name]
            known |= set(series)
            for matcher in selector.matchers.matchers:
                assert matcher.name in series, f"{selector.name} has no label {matcher.name}"
                for value in _plain_values(matcher):
                    assert value in series[matcher.name], f"{selector.name} never has {matcher.name}={value!r}"
        for node in nodes(tree):
            for label in _grouping(node):
                assert label in known, f"{expression} groups by {label}, which no series has"

    def labels_of(self, expression: str) -> set[str]:
        """Labels of the result: those that its aggregation keeps, or else those of its series."""
        found: set[str] = set()
        for node in nodes(promql_parser.parse(expression)):
            if isinstance(node, promql_parser.AggregateExpr):
                return set(node.modifier.labels) if node.modifier is not None else set()
            if isinstance(node, promql_parser.VectorSelector):
                found |= set(self.labels[node.name])
        return found


def expressions(panel: dict[str, Any]) -> list[str]:
    """A panel's PromQL as Prometheus gets it."""
    found = []
    for target in panel["targets"]:
        expression = target["expr"]
        for variable, value in _VARIABLES.items():
            expression = expression.replace(variable, value)
        assert "$" not in expression
        found.append(expression)
    return found


def nodes(tree: promql_parser.Expr) -> Iterator[promql_parser.Expr]:
    """``tree`` and all beneath it."""
    found: list[promql_parser.Expr] = []
    promql_parser.walk(tree, found.append)
    return iter(found)


def _plain_values(matcher: promql_parser.Matcher) -> list[str]:
    """What a matcher names outright: ``a|b`` is two values; other regular expressions name none."""
    values = matcher.value.split("|")
    return values if all(value.replace("_", "").isalnum() for value in values) else []


def _grouping(node: promql_parser.Expr) -> list[str]:
    if isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
        return list(node.modifier.labels)
    if isinstance(node, promql_parser.BinaryExpr) and node.modifier is not None:
        matching = node.modifier.matching
        return [*(matching.labels if matching else []), *(node.modifier.group_labels or [])]
    return []
