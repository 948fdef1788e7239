"""What Baton's processes export, and what an expression asks for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser as promql
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric

from deploy.control import ClusterStatus, PoolStatus, RouterStatus, WorkerStatus
from deploy.pool_metrics import _PoolCollector
from llm_engine.api.messages import Load, Role, WorkerInfo
from llm_engine.serving.metrics import WorkerMetrics
from router.metrics import RouterMetrics
from tests.helm.charts import CHART

TARGET = {"cluster_name", "pool", "pod", "namespace", "job", "instance"}  # labels that scraping adds
VARIABLES = {"$cluster": ".*", "$pool": ".*", "$pod": ".*", "$__rate_interval": "1m"}
_SUFFIXES = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("_total",), "gauge": ("",)}


def dashboards() -> dict[str, dict[str, Any]]:
    """Every dashboard by file name."""
    return {file.name: json.loads(file.read_text(encoding="utf-8")) for file in (CHART / "dashboards").glob("*.json")}


def expressions(dashboard: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Panel title and expression, with the variables filled in."""
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            expr = target["expr"]
            for name, value in VARIABLES.items():
                expr = expr.replace(name, value)
            assert "$" not in expr, f"{panel['title']}: an unknown variable in {expr}"
            yield panel["title"], expr


def exported() -> dict[str, set[str]]:
    """Series names of router, workers and controller, with their labels."""
    info = WorkerInfo(
        name="decode-0",
        role=Role.DECODE,
        incarnation="i",
        pid=1,
        request_addr="tcp://h:1",
        control_addr="",
        metrics_addr="",
        model="m",
        format_id="f",
        weight_version="w",
        block_tokens=16,
        num_blocks=8,
        max_model_len=64,
        max_num_seqs=4,
    )
    worker = WorkerMetrics()
    worker.watch(info, lambda: Load(seq=0))
    controller = CollectorRegistry()
    member = WorkerStatus(name="decode-0", role=Role.DECODE, state="ready")
    pools = {"decode": PoolStatus(desired=1, ready=1)}
    status = ClusterStatus(ready=True, model="m", router=RouterStatus(), pools=pools, workers=[member])
    controller.register(_PoolCollector(lambda: status))
    found: dict[str, set[str]] = {}
    for registry in (RouterMetrics().registry, worker.registry, controller):
        declared = {getattr(c, "_name", ""): set(getattr(c, "_labelnames", ())) for c in registry._collector_to_names}
        for family in registry.collect():
            labels = declared.get(family.name, set()) | {label for s in family.samples for label in s.labels}
            for name in _series(family):
                found.setdefault(name, set()).update(labels | ({"le"} if name.endswith("_bucket") else set()))
    return found


def _series(family: Metric) -> list[str]:
    return [family.name + suffix for suffix in _SUFFIXES[family.type]]


def selectors(expr: str) -> list[tuple[str, set[str]]]:
    """Series that an expression selects, with the labels it names. Raises ValueError when it does not parse."""
    names = [
        (found.name, {matcher.name for matcher in found.matchers.matchers}) for found in _vectors(promql.parse(expr))
    ]
    assert names, f"{expr} selects nothing"
    return names


def grouped(expr: str) -> set[str]:
    """Labels by which an expression groups."""
    return {
        label.strip()
        for group in re.findall(r"\bby\s*\(([^)]*)\)", expr)
        for label in group.split(",")
        if label.strip() and label.strip() != "le"
    }


def bounds(text: str) -> set[str]:
    """Values of `le` that expressions, plain or in JSON, name."""
    return set(re.findall(r'le=\\?"([0-9.]+)', text))


def _vectors(node: Any) -> Iterator[Any]:
    if isinstance(node, promql.VectorSelector):
        yield node
    elif isinstance(node, promql.MatrixSelector):
        yield node.vector_selector
    elif isinstance(node, promql.BinaryExpr):
        yield from _vectors(node.lhs)
        yield from _vectors(node.rhs)
    elif isinstance(node, promql.Call):
        for argument in node.args:
            yield from _vectors(argument)
    elif isinstance(node, promql.AggregateExpr | promql.ParenExpr | promql.UnaryExpr | promql.SubqueryExpr):
        yield from _vectors(node.expr)


def rule_file(spec: dict[str, Any], path: Path) -> Path:
    """A PrometheusRule's content as a rule file."""
    path.write_text(json.dumps(spec), encoding="utf-8")  # JSON is YAML
    return path
