"""Dashboards and alerts: valid, built on series that exist, and firing when they should."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from router.metrics import RouterMetrics
from tests.helm import metrics
from tests.helm.charts import (
    CHART,
    HELMS,
    Manifest,
    groups,
    only,
    options,
    pod_specs,
    rendered,
    run,
    schemas,
    template,
    tool,
)

NAMES = ("caches.json", "handoff.json", "overview.json", "speculation.json", "workers.json")


def rules(helm: str = HELMS[-1]) -> Manifest:
    spec: Manifest = only(rendered("gpu", True, True, helm=helm), "PrometheusRule")["spec"]
    return spec


def alerts() -> list[Manifest]:
    return [rule for group in rules()["groups"] for rule in group["rules"]]


def test_dashboards_are_what_their_source_makes() -> None:
    spec = importlib.util.spec_from_file_location("build", CHART / "dashboards" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = {name: (CHART / "dashboards" / name).read_text(encoding="utf-8") for name in NAMES}
    assert written == module.build(), "run: python helm/dashboards/build.py"


@pytest.mark.parametrize("name", NAMES)
def test_a_dashboard_is_valid_for_grafana(name: str) -> None:
    dashboard = metrics.dashboards()[name]
    schema = json.loads((schemas("grafana-jsonschema") / "dashboard.jsonschema.json").read_text(encoding="utf-8"))
    jsonschema.Draft7Validator(schema).validate(dashboard)
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    places = [panel["gridPos"] for panel in dashboard["panels"]]
    cells = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
    assert len(set(cells)) == len(cells), "panels overlap"
    assert max(x for x, _ in cells) < 24


@pytest.mark.parametrize("name", NAMES)
def test_panels_ask_for_series_that_exist(name: str) -> None:
    exported = metrics.exported()
    for title, expr in metrics.expressions(metrics.dashboards()[name]):
        check(exported, title, expr)


def test_alerts_ask_for_series_that_exist() -> None:
    exported = metrics.exported()
    for rule in alerts():
        check(exported, rule["alert"], rule["expr"])
        assert 'cluster_name="baton"' in rule["expr"], "another release must not set this one's alarm off"
    assert len(alerts()) >= 14


def check(exported: dict[str, set[str]], title: str, expr: str) -> None:
    asked: set[str] = set()
    for series, labels in metrics.selectors(expr):
        assert series in exported, f"{title}: nobody exports {series}"
        assert labels <= exported[series] | metrics.TARGET, f"{title}: {series} has no {labels - exported[series]}"
        asked |= exported[series]
    assert metrics.grouped(expr) <= asked | metrics.TARGET, f"{title}: grouped by a label that is not there"


@pytest.mark.parametrize("ttft", [0.5, 2, 10])
def test_an_objective_is_the_bound_of_a_bucket(ttft: float) -> None:
    router = RouterMetrics()
    router.first_token({"router": 0.1})
    text = router.render().decode()
    done = template(HELMS[-1], [*options("gpu", True), "--set-json", f"monitoring.slo.ttftSeconds={ttft}"])
    assert done.code == 0, done.err
    [spec] = [doc["spec"] for doc in yaml.safe_load_all(done.out) if doc and doc["kind"] == "PrometheusRule"]
    named = metrics.bounds(json.dumps([rule["expr"] for group in spec["groups"] for rule in group["rules"]]))
    assert len(named) == 2
    for le in named:
        assert f'le="{le}"' in text


@pytest.mark.parametrize("helm", HELMS)
def test_alerts_fire_when_they_should(helm: str, tmp_path: Path) -> None:
    promtool = tool("promtool")
    file = metrics.rule_file(rules(helm), tmp_path / "rules.json")
    checked = run(promtool, "check", "rules", str(file))
    assert checked.code == 0, checked.out + checked.err
    cases = (Path(__file__).parent / "alerts_test.yaml").read_text(encoding="utf-8").replace("RULES", str(file))
    (tmp_path / "test.yaml").write_text(cases, encoding="utf-8")
    tested = run(promtool, "test", "rules", str(tmp_path / "test.yaml"))
    assert tested.code == 0, tested.out + tested.err


def test_every_alert_has_a_test() -> None:
    tested = (Path(__file__).parent / "alerts_test.yaml").read_text(encoding="utf-8")
    untested = {rule["alert"] for rule in alerts() if f"alertname: {rule['alert']}\n" not in tested}
    assert untested == {"BatonTtftBurnsSlow"}, "its twin for TPOT is tested, and both are one template"


def test_monitors_find_the_ports_and_labels_of_the_pods() -> None:
    docs = rendered("gpu", True)
    routers = only(docs, "PodMonitor", "baton-router")["spec"]
    deployment = only(docs, "Deployment")["spec"]["template"]
    assert routers["selector"]["matchLabels"].items() <= deployment["metadata"]["labels"].items()
    names = {port["name"] for port in pod_specs(docs)["baton-router"]["containers"][0]["ports"]}
    assert {endpoint["port"] for endpoint in routers["podMetricsEndpoints"]} <= names
    workers = only(docs, "PodMonitor", "baton-worker")["spec"]
    assert workers["selector"]["matchLabels"] == {"ray.io/cluster": "baton", "ray.io/node-type": "worker"}
    for group in groups(docs).values():
        names = {port["name"] for port in group["template"]["spec"]["containers"][0]["ports"]}
        assert {endpoint["port"] for endpoint in workers["podMetricsEndpoints"]} <= names
    controller = only(docs, "ServiceMonitor")["spec"]
    service = only(docs, "Service", "baton-controller")
    assert controller["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert controller["endpoints"][0]["port"] in {port["name"] for port in service["spec"]["ports"]}


def test_dashboards_reach_grafana() -> None:
    docs = rendered("gpu", True)
    maps = [d for d in docs if d["kind"] == "ConfigMap" and "grafana_dashboard" in d["metadata"]["labels"]]
    assert {name for d in maps for name in d["data"]} == set(NAMES)
    for name, dashboard in metrics.dashboards().items():
        [text] = [d["data"][name] for d in maps if name in d["data"]]
        assert json.loads(text) == dashboard
    assert len(json.dumps(maps)) < 1 << 20, "a ConfigMap holds at most 1 MiB"
