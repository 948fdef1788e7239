"""Routers come, go silent, reconnect, and are told what they missed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llm_engine.api.messages import Failed
from llm_engine.serving.routers import MAX_ROUTERS, RouterTable


def failed(request_id: str) -> Failed:
    return Failed(request_id=request_id, attempt=0, code="router", reason="", retryable=True)


def test_silence_is_counted_per_router_and_only_once() -> None:
    table = RouterTable(silence_s=1.0)
    assert table.hello("a", b"1") is True
    assert table.hello("b", b"2") is True
    assert table.tick(0.8) == []
    assert table.heard(b"2") == "b"
    assert table.tick(0.3) == ["a"]
    assert table.lose("a")
    assert table.tick(5.0) == ["b"]
    assert not table.lose("a")


def test_a_lost_router_is_unreachable_until_its_next_hello_and_then_gets_what_is_owed() -> None:
    table = RouterTable(silence_s=1.0)
    table.hello("a", b"1")
    table.lose("a")
    assert table.route("a") is None
    assert table.heard(b"1") is None
    table.owe(failed("x"), "a")
    table.owe(failed("y"), "stranger")
    assert table.hello("a", b"9") is True
    assert table.route("a") == b"9"
    assert [f.request_id for f in table.settle("a")] == ["x"]
    assert table.settle("a") == []
    assert table.hello("a", b"9") is False


def test_a_full_table_forgets_lost_routers_but_never_connected_ones() -> None:
    table = RouterTable(silence_s=1.0)
    for number in range(MAX_ROUTERS):
        assert table.hello(f"r{number}", b"%d" % number) is True
    assert table.hello("late", b"late") is None
    assert table.heard(b"late") is None
    table.lose("r5")
    assert table.hello("late", b"late") is True
    assert table.route("r5") is None
    assert len(table.connected()) == MAX_ROUTERS


@given(
    st.lists(
        st.tuples(st.sampled_from(["hello", "lose", "tick"]), st.sampled_from("abc"), st.integers(0, 4)), max_size=40
    )
)
def test_a_route_leads_to_one_router_and_back(steps: list[tuple[str, str, int]]) -> None:
    table = RouterTable(silence_s=2.0)
    for action, router_id, number in steps:
        route = f"{router_id}{number}".encode()
        if action == "hello":
            table.hello(router_id, route)
        elif action == "lose":
            table.lose(router_id)
        else:
            for silent in table.tick(1.0):
                table.lose(silent)
        for connected in table.connected():
            where = table.route(connected)
            assert where is not None
            assert table.heard(where) == connected
