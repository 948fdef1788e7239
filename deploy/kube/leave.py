"""Before a worker's pod ends: take its worker out by the exact count of what it still holds.

    the pod's own /metrics: which worker → controller: drain it → until it holds no request and no hand-off

The controller starts a replacement meanwhile. After the bound the worker gives its remaining sequences back to
the routers, which go on with them on another worker: no stream breaks, some pause.
"""

from __future__ import annotations

import logging
import time
import urllib.request
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from deploy.control import ControlClient, ControlRefused, ControlTimeout, DrainWorker
from llm_engine.api.config import cluster_key

_log = logging.getLogger(__name__)

_POLL_S = 0.5
_HELD = ("baton_live_requests", "baton_pending_handoffs")


@dataclass(frozen=True, slots=True)
class Vitals:
    """What a worker says about itself. `held`: live requests plus open hand-offs, both exact."""

    name: str
    held: int
    draining: bool


def leave(metrics_url: str, controller: str, timeout_s: float) -> bool:
    """Drain the worker behind `metrics_url`; True when it holds nothing any more, False when the time is up first."""
    worker = look(metrics_url)
    if worker is None:
        return True  # no worker runs in this pod (any more)
    _log.info("%s: leaving with %d requests and hand-offs", worker.name, worker.held)
    deadline = time.monotonic() + timeout_s
    asked = False
    while time.monotonic() < deadline:
        asked = asked or _ask(controller, worker.name)
        now = look(metrics_url)
        if now is None or (now.draining and now.held == 0):
            _log.info("%s: drained", worker.name)
            return True
        time.sleep(_POLL_S)
    _log.warning("%s: time is up; what still runs moves to other workers", worker.name)
    return False


def look(metrics_url: str) -> Vitals | None:
    """None: nothing serves there."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(metrics_url, timeout=2.0) as response:
            text = response.read().decode()
    except OSError:
        return None
    name, held, draining = "", 0, False
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "baton_worker_info":
                name = sample.labels["name"]
            elif sample.name in _HELD:
                held += int(sample.value)
            elif sample.name == "baton_draining":
                draining = bool(sample.value)
    return Vitals(name, held, draining) if name else None


def _ask(controller: str, worker: str) -> bool:
    """Whether the controller knows. One that is away is asked again: it may be moving itself."""
    try:
        with ControlClient(controller, cluster_key()) as client:
            client.ask(DrainWorker(worker=worker), timeout_s=2.0)
    except ControlTimeout as exc:
        _log.warning("%s", exc)
        return False
    except ControlRefused as exc:  # it has gone already
        _log.info("%s", exc)
    return True
