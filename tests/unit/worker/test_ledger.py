"""The ledger against a slow obvious model: at most one live attempt a request, and nothing comes back from the dead."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from llm_engine.serving import ledger as ledger_module
from llm_engine.serving.ledger import Ledger
from tests.unit.worker.router_client import submit_of

REQUESTS = st.sampled_from(["a", "b", "c"])
ATTEMPTS = st.integers(0, 5)
ROUTERS = st.sampled_from(["r1", "r2"])


class LedgerMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.ledger: Ledger[int] = Ledger()
        self.live: dict[str, tuple[int, str]] = {}
        self.over: dict[str, int] = {}

    @rule(request=REQUESTS, attempt=ATTEMPTS, router=ROUTERS)
    def open(self, request: str, attempt: int, router: str) -> None:
        known = max(self.over.get(request, -1), self.live.get(request, (-1, ""))[0])
        assert self.ledger.is_stale(request, attempt) == (attempt <= known)
        if attempt > known:
            older = self.ledger.close(request, attempt - 1)
            assert (older is not None) == (request in self.live)
            self.over[request] = max(self.over.get(request, -1), attempt - 1)
            submit = submit_of([1], request_id=request, attempt=attempt, router_id=router)
            assert self.ledger.open(submit, 100.0, 7).deadline == 100.0 + submit.deadline_s
            self.live[request] = (attempt, router)

    @rule(request=REQUESTS, attempt=ATTEMPTS)
    def close(self, request: str, attempt: int) -> None:
        closed = self.ledger.close(request, attempt)
        live = self.live.get(request)
        ends = live is not None and live[0] <= attempt
        assert (closed is not None) == ends
        if ends:
            del self.live[request]
        self.over[request] = max(self.over.get(request, -1), attempt)

    @invariant()
    def same_live_attempts(self) -> None:
        assert {(live.request_id, live.attempt, live.router_id) for live in self.ledger.all()} == {
            (request, attempt, router) for request, (attempt, router) in self.live.items()
        }
        assert len(self.ledger) == len(self.live)
        for request, (attempt, router) in self.live.items():
            assert self.ledger.get(request, attempt) in self.ledger.of_router(router)
            assert self.ledger.get(request, attempt + 1) is None
            assert self.ledger.get(request, attempt - 1) is None


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_memory_of_the_dead_is_bounded() -> None:
    ledger: Ledger[None] = Ledger()
    for number in range(ledger_module.MAX_REMEMBERED + 10):
        ledger.close(f"request-{number}", 0)
    assert not ledger.is_stale("request-0", 0)
    assert ledger.is_stale(f"request-{ledger_module.MAX_REMEMBERED + 9}", 0)
