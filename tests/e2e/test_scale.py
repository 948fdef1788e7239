"""Pools scale apart under traffic, by the admin API and by `baton scale`, and no stream notices."""

from __future__ import annotations

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.conftest import MAX_CARDS
from tests.e2e.site import Json, Site, worker_of
from tests.e2e.traffic import STREAMS, URL, Traffic

pytestmark = pytest.mark.timeout(300)


def put(site: Site, pool: str, replicas: int, **extra: str) -> httpx.Response:
    with site.host.network(), httpx.Client(trust_env=False, timeout=10.0) as http:
        return http.put(f"{URL}/admin/pools/{pool}", json={"replicas": replicas, **extra})


def members(status: Json, pool: str) -> list[str]:
    return [worker["name"] for worker in status["workers"] if worker["role"] == pool]


def accepted_drafts(site: Site, name: str) -> float:
    """MTP drafts that a worker has verified and kept."""
    address = site.worker(name)["metrics_addr"]
    with site.host.network(), httpx.Client(trust_env=False, timeout=10.0) as http:
        families = text_string_to_metric_families(http.get(address).text)
    return sum(s.value for family in families for s in family.samples if s.name == "baton_accepted_tokens_total")


def flip(site: Site) -> None:
    """With every card in use, a prefill worker becomes a decode worker: drained first, back in its new role after.

    Streams decode there with MTP.
    """
    refused = put(site, "decode", 3)
    assert refused.status_code == 409
    assert f"autoscaler.max_cards={MAX_CARDS}" in refused.json()["error"]["message"]
    assert site.baton("scale", "prefill", "1", "--no-wait").returncode == 0
    assert put(site, "decode", 3, reason="role flip").status_code == 200

    def flipped(now: Json) -> bool:
        assert len(now["workers"]) <= MAX_CARDS, now["workers"]
        return bool(now["ready"] and now["pools"]["decode"]["ready"] == 3 and members(now, "prefill") == ["prefill-0"])

    site.until(flipped)
    site.until(lambda now: accepted_drafts(site, "decode-2") > 0)


def idle(worker: Json) -> bool:
    """Whether a worker reports nothing in hand; it does so a moment after its last stream has ended."""
    return (worker["sequences"], worker["pending_handoffs"]) == (0, 0)


@pytest.mark.slow
def test_pools_scale_apart_under_traffic(shared_site: Site) -> None:
    traffic = Traffic(shared_site)
    with traffic:
        assert put(shared_site, "decode", 2, reason="more streams").json()["decode"]["desired"] == 2
        up = shared_site.baton("scale", "prefill", "2")
        assert (up.returncode, up.stdout) == (0, "prefill: 2 ready\n"), up.stderr
        both = shared_site.until(lambda now: now["ready"] and now["pools"]["decode"]["ready"] == 2)
        assert members(both, "prefill") == ["prefill-0", "prefill-1"]
        flip(shared_site)
        assert put(shared_site, "decode", 1).status_code == 200
        shared_site.until(lambda now: members(now, "decode") == ["decode-0"])
        texts = traffic.texts()
    assert len(texts) >= STREAMS
    assert set(texts) == {traffic.expected}
    status = shared_site.status()
    changes = status["changes"][-5:]
    assert [(c["pool"], c["before"], c["after"], c["by"]) for c in changes] == [
        ("decode", 1, 2, "admin"),
        ("prefill", 1, 2, "cli"),
        ("prefill", 2, 1, "cli"),
        ("decode", 2, 3, "admin"),
        ("decode", 3, 1, "admin"),
    ]
    assert changes[0]["reason"] == "more streams"
    shared_site.until(lambda now: idle(worker_of(now, "decode-0")))


@pytest.mark.parametrize(
    ("pool", "body", "status", "said"),
    [
        ("decode", {"replicas": 5000}, 409, "expected 0 to 1024"),
        ("encode", {"replicas": 1}, 409, "pool 'encode'"),
        ("decode", {"replicas": -1}, 400, ">= 0"),
        ("decode", {"replica": 1}, 400, "replica"),
    ],
)
def test_an_impossible_size_is_refused(shared_site: Site, pool: str, body: Json, status: int, said: str) -> None:
    with shared_site.host.network(), httpx.Client(trust_env=False, timeout=10.0) as http:
        answer = http.put(f"{URL}/admin/pools/{pool}", json=body)
    assert answer.status_code == status
    assert said in answer.json()["error"]["message"]
    assert shared_site.status()["ready"]
