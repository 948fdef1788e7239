"""A real Prometheus scrapes a real cluster as the chart's monitors would: every panel and alert finds its data."""

from __future__ import annotations

import json
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.control import ClusterStatus
from tests.helm import metrics
from tests.helm.charts import only, rendered, tool
from tests.helm.pods import URL, Pods, open_pods, serving

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PROMETHEUS = "http://127.0.0.1:9090"
# Series that exist only once something has gone wrong.
INCIDENTS = {
    "baton_refusals_total",
    "baton_recoveries_total",
    "baton_handoff_failures_total",
    "baton_worker_losses_total",
    "baton_rejected_frames_total",
}


def scrape_config(status: ClusterStatus) -> dict[str, Any]:
    """The labels that the chart's monitors give."""

    def target(address: str, **labels: str) -> dict[str, Any]:
        return {"targets": [address], "labels": {"cluster_name": "baton", **labels}}

    workers = [
        target(urllib.parse.urlsplit(worker.metrics_addr).netloc, pool=worker.role.value, pod=worker.name)
        for worker in status.workers
    ]
    jobs = {
        "router": [target("127.0.0.1:8000", pod="router-0")],
        "controller": [target("127.0.0.1:7003")],
        "workers": workers,
    }
    return {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s"},
        "scrape_configs": [
            {"job_name": name, "honor_labels": name == "controller", "static_configs": targets}
            for name, targets in jobs.items()
        ],
    }


def query(pods: Pods, expr: str) -> list[dict[str, Any]]:
    words = urllib.parse.urlencode({"query": expr})
    with pods.host.network(), urllib.request.urlopen(f"{PROMETHEUS}/api/v1/query?{words}", timeout=10.0) as answer:
        result: list[dict[str, Any]] = json.loads(answer.read())["data"]["result"]
    return result


def until(pods: Pods, what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60.0
    while time.monotonic() < deadline:
        try:
            if what():
                return
        except OSError:
            pass  # it is starting
        time.sleep(0.5)
    pytest.fail(pods.logs())


def test_every_panel_and_alert_finds_its_data(tmp_path: Path, nano_dir: Path) -> None:
    prometheus = tool("prometheus")
    with open_pods(tmp_path, nano_dir) as pods, serving(pods):
        status = pods.until(lambda now: now.ready)
        (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(scrape_config(status)), encoding="utf-8")
        where = (f"--config.file={tmp_path / 'prometheus.yaml'}", f"--storage.tsdb.path={tmp_path / 'tsdb'}")
        pods.start("prometheus", prometheus, *where, "--web.listen-address=127.0.0.1:9090")
        until(pods, lambda: len(query(pods, "up == 1")) == 4)
        smoke = ("python", "-m", "deploy.kube", "smoke", "--url", URL, "--model", "nano")

        def missing() -> list[str]:
            """Panels without data, after one more request."""
            assert pods.run(*smoke).returncode == 0, pods.logs()
            return [
                f"{name}: {title}: {expr}"
                for name, dashboard in metrics.dashboards().items()
                for title, expr in metrics.expressions(dashboard)
                if not query(pods, expr) and not {series for series, _ in metrics.selectors(expr)} <= INCIDENTS
            ]

        left = missing()
        for _ in range(10):  # a rate needs two scrapes after the first event
            left = missing() if left else left
        assert not left, left
        rules = only(rendered("gpu", True), "PrometheusRule")["spec"]["groups"]
        for rule in (rule for group in rules for rule in group["rules"]):
            assert not query(pods, rule["expr"]), f"{rule['alert']} fires on a healthy cluster"
            for series, _ in metrics.selectors(rule["expr"]):
                assert series in INCIDENTS or query(pods, series), f"{rule['alert']}: no {series}"

        stages, total = "sum(baton_ttft_stage_seconds_sum)", "sum(baton_ttft_seconds_sum)"
        [difference] = query(pods, f"abs({stages} - {total}) / sum(baton_ttft_seconds_count)")
        assert float(difference["value"][1]) < 0.001, "the stages do not add up to the time to first token"
