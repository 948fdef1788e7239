from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_engine.api.errors import ConfigError, TooManyRequests
from router.routes import ready
from router.tenants import LOOK_PERIOD_S, Tenant, Tenants, TenantSettings, Unauthorized, is_loopback
from tests.unit.router.edge_harness import MODEL, RunningEdge, Script, ScriptedDispatcher, make_edge, running_edge

ACME, ACME_NEXT, GLOBEX = "sk-acme-0123456789", "sk-acme-next-0123456789", "sk-globex-0123456789"


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def headers(key: str) -> list[tuple[bytes, bytes]]:
    return [(b"host", b"x"), (b"authorization", f"Bearer {key}".encode())]


def write(path: Path, text: str) -> Path:
    draft = path.with_suffix(".new")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    digest = hashlib.sha256(GLOBEX.encode()).hexdigest()
    return write(
        tmp_path / "tenants.toml",
        f'[tenants.acme]\nkeys = ["{ACME}"]\nmax_concurrent = 2\n'
        f'[tenants.globex]\nkeys = ["sha256:{digest}"]\nrequests_per_minute = 60\nburst = 3\n'
        '[admin]\nkeys = ["admin-key-0123456789"]\n',
    )


@contextlib.contextmanager
def several(tenants: Tenants, key: str, count: int) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            stack.enter_context(tenants.admit(headers(key)))
        yield


def test_without_a_file_everybody_is_served_and_caches_are_shared() -> None:
    with Tenants(None, Clock()).admit([]) as salt:
        assert salt == ""


def test_a_key_names_its_tenant_hashed_or_not(file: Path) -> None:
    tenants = Tenants(file, Clock())
    with tenants.admit(headers(ACME)) as acme, tenants.admit(headers(GLOBEX)) as globex:
        assert acme != globex, "one tenant would find the other's prefixes"
    assert tenants.admin_keys() == ("admin-key-0123456789",)


@pytest.mark.parametrize(
    "given_",
    [
        [],
        [(b"authorization", b"Bearer ")],
        [(b"authorization", f"Basic {ACME}".encode())],
        headers("sk-nobody-0123456789"),
        headers(ACME + "x"),
        headers("admin-key-0123456789"),
    ],
)
def test_without_a_valid_key_nothing_is_served(file: Path, given_: list[tuple[bytes, bytes]]) -> None:
    with pytest.raises(Unauthorized), Tenants(file, Clock()).admit(given_):
        pass


def test_concurrent_requests_are_bounded_and_given_back(file: Path) -> None:
    tenants = Tenants(file, Clock())
    with several(tenants, ACME, 2):
        with pytest.raises(TooManyRequests, match="max_concurrent"), tenants.admit(headers(ACME)):
            pass
        with tenants.admit(headers(GLOBEX)):
            pass
    with several(tenants, ACME, 2):
        pass


def test_a_rate_allows_a_burst_and_then_its_pace(file: Path) -> None:
    clock = Clock()
    tenants = Tenants(file, clock)
    with several(tenants, GLOBEX, 3), pytest.raises(TooManyRequests) as refused, tenants.admit(headers(GLOBEX)):
        pass
    assert refused.value.retry_after_s == pytest.approx(1.0)
    clock.now += 1.0
    with tenants.admit(headers(GLOBEX)):
        pass


@given(st.lists(st.floats(0, 10), max_size=60), st.floats(1, 600), st.integers(1, 20))
def test_no_pattern_of_arrivals_gets_more_than_rate_and_burst(gaps: list[float], per_minute: float, burst: int) -> None:
    tenant = Tenant("t", TenantSettings(keys=["k" * 16], requests_per_minute=per_minute, burst=burst))
    now = start = 1000.0
    served = 0
    for gap in gaps:
        now += gap
        with contextlib.suppress(TooManyRequests):
            tenant.take(now)
            served += 1
        assert served <= burst + (now - start) * per_minute / 60 + 1e-6


def test_keys_are_replaced_without_a_restart_and_open_requests_go_on(file: Path) -> None:
    clock = Clock()
    tenants = Tenants(file, clock)
    with tenants.admit(headers(ACME)):
        write(file, f'[tenants.acme]\nkeys = ["{ACME_NEXT}"]\nmax_concurrent = 1\n')
        clock.now += LOOK_PERIOD_S
        with pytest.raises(Unauthorized), tenants.admit(headers(ACME)):
            pass
        with pytest.raises(TooManyRequests), tenants.admit(headers(ACME_NEXT)):
            pass  # the request under the old key still counts
    with tenants.admit(headers(ACME_NEXT)):
        pass
    assert tenants.admin_keys() == ()


def test_a_broken_file_keeps_the_keys_before(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    tenants = Tenants(file, clock)
    write(file, "[tenants.acme]\nkeys = 3\n")
    clock.now += LOOK_PERIOD_S
    with tenants.admit(headers(ACME)):
        pass
    assert "tenants.acme.keys" in caplog.text or "$.tenants" in caplog.text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[tenants.a]\nkeys = ['short']\n", "length >= 16"),
        ("[tenants.a]\nkeys = ['sha256:zz-not-hexadecimal']\n", "tenants.a.keys"),
        ("[tenants.a]\nkeys = []\nmax_conc = 1\n", "max_conc"),
        (f"[tenants.a]\nkeys = ['{ACME}']\n[tenants.b]\nkeys = ['{ACME}']\n", "tenants a and b"),
        ("[tenants.a\n", "tenants.toml"),
    ],
)
def test_a_file_that_can_not_be_used_is_refused_at_the_start(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Tenants(write(tmp_path / "tenants.toml", text), Clock())
    with pytest.raises(ConfigError, match="No such file"):
        Tenants(tmp_path / "missing.toml", Clock())


def allowed(tenants: Tenants, key: str) -> int:
    """How many requests are admitted at once."""
    admitted = 0
    with contextlib.ExitStack() as stack, contextlib.suppress(TooManyRequests):
        while True:
            stack.enter_context(tenants.admit(headers(key)))
            admitted += 1
    return admitted


def test_routers_share_the_limits_and_their_number_may_change(file: Path) -> None:
    clock, routers = Clock(), 1
    tenants = Tenants(file, clock, share=lambda: routers)
    assert (allowed(tenants, ACME), allowed(tenants, GLOBEX)) == (2, 3)
    for routers, at_once, burst in ((2, 1, 2), (3, 1, 1), (1, 2, 3)):
        clock.now += 60.0
        assert (allowed(tenants, ACME), allowed(tenants, GLOBEX)) == (at_once, burst), routers


def test_a_changed_file_is_shared_too(file: Path) -> None:
    clock = Clock()
    tenants = Tenants(file, clock, share=lambda: 2)
    write(file, f'[tenants.acme]\nkeys = ["{ACME}"]\nmax_concurrent = 8\n')
    clock.now += LOOK_PERIOD_S
    assert allowed(tenants, ACME) == 4


@pytest.fixture
def edge(file: Path) -> Iterator[RunningEdge]:
    dispatcher = ScriptedDispatcher(lambda request: Script([[10, 11]]))
    with running_edge(dispatcher, tenants_file=file) as edge:
        yield edge


def complete(edge: RunningEdge, key: str | None, salt: str | None = None) -> httpx.Response:
    body = {"model": MODEL, "prompt": "hi", "max_tokens": 2, **({"cache_salt": salt} if salt else {})}
    given = {"Authorization": f"Bearer {key}"} if key else {}
    return edge.http.post("/v1/completions", json=body, headers=given)


def test_over_http_a_key_decides_and_a_tenant_can_not_choose_anothers_cache(edge: RunningEdge) -> None:
    refused = complete(edge, None)
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
    assert refused.headers["www-authenticate"] == "Bearer"
    assert complete(edge, ACME).status_code == 200
    assert complete(edge, ACME, "x").status_code == 200
    assert complete(edge, GLOBEX, "x").status_code == 200
    salts = [request.salt for request in edge.dispatcher.requests]
    assert len(set(salts)) == 3, salts
    assert edge.http.get("/v1/models").status_code == 401
    assert edge.http.get("/health").status_code == 200
    limited = [complete(edge, GLOBEX) for _ in range(4)][-1]
    assert (limited.status_code, limited.headers["retry-after"]) == (429, "1")


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("10.0.0.1", False),
        ("::ffff:10.0.0.1", False),
        ("x", False),
    ],
)
def test_who_is_on_this_host(address: str, local: bool) -> None:
    assert is_loopback(address) is local


async def test_readiness_tells_strangers_nothing_but_readiness() -> None:
    class Asked:
        """An exchange of a client elsewhere."""

        answer: tuple[int, bytes] | None = None

        def client(self) -> tuple[str, int]:
            return ("10.0.0.1", 5)

        def respond(self, status: int, body: bytes) -> None:
            self.answer = status, body

    asked = Asked()
    await ready(make_edge(ScriptedDispatcher(lambda request: Script([[10]]))), asked)  # type: ignore[arg-type]
    assert asked.answer == (200, b'{"ready":true,"detail":{}}')
