from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_engine.api.messages import Role, WorkerInfo
from router.policy import (
    Choice,
    DecodeState,
    Demand,
    PrefillState,
    Shortage,
    cheapest_pair,
    decode_cost,
    prefill_time,
)

DEMAND = Demand(num_tokens=1000, max_output=100)


def info(name: str, role: Role = Role.PREFILL, **changes: Any) -> WorkerInfo:
    base = WorkerInfo(
        name=name,
        role=role,
        incarnation=f"{name}.1",
        pid=1,
        request_addr="",
        control_addr="",
        metrics_addr="",
        model="m",
        format_id="f",
        weight_version="0",
        block_tokens=16,
        num_blocks=1000,
        max_model_len=8192,
        max_num_seqs=8,
    )
    return msgspec.structs.replace(base, **changes)


def prefill(name: str = "p0", changes: dict[str, Any] | None = None, **state: Any) -> PrefillState:
    state.setdefault("tokens_per_s", 1000.0)
    return PrefillState(info(name, Role.PREFILL, **(changes or {})), **state)


def decode(name: str = "d0", changes: dict[str, Any] | None = None, **state: Any) -> DecodeState:
    state = {"blocks_available": 1000, "step_s": 0.01, **state}
    return DecodeState(info(name, Role.DECODE, **(changes or {})), **state)


def names(choice: Choice | Shortage, prefills: list[PrefillState], decodes: list[DecodeState]) -> tuple[str, str]:
    assert isinstance(choice, Choice)
    assert choice.decode is not None
    return prefills[choice.prefill].info.name, decodes[choice.decode].info.name


def chosen(prefills: list[PrefillState], decodes: list[DecodeState], demand: Demand = DEMAND) -> tuple[str, str]:
    return names(cheapest_pair(demand, prefills, decodes, ()), prefills, decodes)


def test_prefill_time_is_queue_and_what_the_cache_lacks_over_the_rate() -> None:
    assert prefill_time(DEMAND, prefill(backlog_tokens=500, hit_tokens=200)) == pytest.approx(1.3)


def test_a_prompt_being_computed_is_waited_for_rather_than_computed_twice() -> None:
    assert chosen([prefill("a"), prefill("b", backlog_tokens=1000, hit_tokens=990)], [decode()])[0] == "b"


def test_a_longer_prefix_hit_wins_until_its_queue_is_longer() -> None:
    cold, warm = prefill("a"), prefill("b", hit_tokens=800)
    assert chosen([cold, warm], [decode()])[0] == "b"
    busy = prefill("b", hit_tokens=800, backlog_tokens=1300)
    assert chosen([cold, busy], [decode()])[0] == "a"


def test_the_faster_prefill_worker_wins() -> None:
    assert chosen([prefill("a"), prefill("b", tokens_per_s=2000.0)], [decode()])[0] == "b"


def test_the_decode_worker_with_fewer_sequences_and_faster_steps_wins() -> None:
    assert chosen([prefill()], [decode("a", num_seqs=5), decode("b", num_seqs=4)])[1] == "b"
    assert chosen([prefill()], [decode("a"), decode("b", step_s=0.005)])[1] == "b"


def test_waiting_for_a_slot_costs_more_than_a_fuller_batch() -> None:
    assert decode_cost(DEMAND, decode(num_seqs=8)) > decode_cost(DEMAND, decode(num_seqs=7)) + 0.01


def test_without_room_for_the_blocks_nobody_is_chosen() -> None:
    # 1000 + 16 tokens are 64 blocks, 10 of them cached there
    assert chosen([prefill()], [decode("a", blocks_available=53, idle=False, hit_tokens=160), decode("b")])[1] == "b"
    assert chosen([prefill()], [decode("a", blocks_available=54, idle=False, hit_tokens=160)])[1] == "a"
    tight = decode(blocks_available=53, idle=False, hit_tokens=160)
    assert cheapest_pair(DEMAND, [prefill()], [tight], ()) is Shortage.FULL


def test_an_idle_worker_has_room_whatever_its_report_says() -> None:
    assert chosen([prefill()], [decode(blocks_available=0, idle=True)]) == ("p0", "d0")


@pytest.mark.parametrize("key", ["format_id", "weight_version", "model", "block_tokens"])
def test_workers_that_differ_are_never_paired(key: str) -> None:
    other: Any = 32 if key == "block_tokens" else "other"
    assert cheapest_pair(DEMAND, [prefill()], [decode(changes={key: other})], ()) is Shortage.NO_PAIR
    slow = decode("slow", num_seqs=7)
    assert chosen([prefill()], [decode("quick", changes={key: other}), slow]) == ("p0", "slow")


def test_a_pair_whose_canary_failed_is_not_used() -> None:
    prefills = [prefill("a", bad_peers=("d0.1",)), prefill("b", backlog_tokens=5000)]
    assert chosen(prefills, [decode("d0")]) == ("b", "d0")
    assert cheapest_pair(DEMAND, prefills[:1], [decode("d0")], ()) is Shortage.NO_PAIR


def test_workers_that_just_failed_the_request_come_last() -> None:
    demand = Demand(1000, 100, frozenset({"a", "d0"}))
    prefills, decodes = [prefill("a"), prefill("b", backlog_tokens=5000)], [decode("d0"), decode("d1", num_seqs=7)]
    assert chosen(prefills, decodes, demand) == ("b", "d1")
    assert chosen(prefills[:1], decodes[:1], demand) == ("a", "d0")


def test_the_whole_sequence_must_fit_the_decode_worker_and_the_prompt_the_prefill_worker() -> None:
    small = {"max_model_len": 1099}
    assert cheapest_pair(DEMAND, [prefill()], [decode(changes=small)], ()) is Shortage.TOO_LONG
    assert chosen([prefill(changes=small)], [decode(changes={"max_model_len": 1100})]) == ("p0", "d0")
    assert cheapest_pair(DEMAND, [prefill()], [decode(changes={"num_blocks": 68})], ()) is Shortage.TOO_LONG
    assert chosen([prefill()], [decode(changes={"num_blocks": 69})]) == ("p0", "d0")
    assert cheapest_pair(DEMAND, [prefill(changes={"max_model_len": 999})], [decode()], ()) is Shortage.TOO_LONG


def test_room_on_one_worker_outweighs_that_another_is_too_small() -> None:
    small, full = decode("small", changes={"max_model_len": 500}), decode("full", blocks_available=0, idle=False)
    assert cheapest_pair(DEMAND, [prefill()], [small, full], ()) is Shortage.FULL


def test_an_aggregated_worker_competes_with_the_pairs() -> None:
    both = (prefill("x"), decode("x"))
    busy = [prefill("p0", backlog_tokens=5000)]
    choice = cheapest_pair(DEMAND, busy, [decode()], [both])
    assert isinstance(choice, Choice)
    assert (choice.prefill, choice.decode) == (0, None)
    choice = cheapest_pair(DEMAND, [prefill()], [decode()], [(prefill("x", backlog_tokens=5000), decode("x"))])
    assert isinstance(choice, Choice)
    assert choice.decode == 0


def test_ties_go_to_the_lower_names() -> None:
    prefills, decodes = [prefill("b"), prefill("a")], [decode("d"), decode("c")]
    assert chosen(prefills, decodes) == chosen(prefills[::-1], decodes[::-1]) == ("a", "c")


@given(
    ps=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 900), st.sampled_from("fg"), st.booleans()), max_size=5),
    ds=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 70), st.sampled_from("fg"), st.booleans()), max_size=5),
)
def test_the_search_finds_what_trying_every_pair_finds(
    ps: list[tuple[int, int, str, bool]], ds: list[tuple[int, int, str, bool]]
) -> None:
    prefills = [
        prefill(f"p{i}", {"format_id": f}, backlog_tokens=b * 500, hit_tokens=h, bad_peers=("d0.1",) if bad else ())
        for i, (b, h, f, bad) in enumerate(ps)
    ]
    decodes = [
        decode(f"d{j}", {"format_id": f}, num_seqs=n, blocks_available=b, idle=idle)
        for j, (n, b, f, idle) in enumerate(ds)
    ]
    options = []
    for p in prefills:
        for d in decodes:
            single = cheapest_pair(DEMAND, [p], [d], ())
            if isinstance(single, Choice):
                options.append((single.cost_s, p.info.name, d.info.name))
    choice = cheapest_pair(DEMAND, prefills, decodes, ())
    if options:
        assert names(choice, prefills, decodes) == min(options)[1:]
    else:
        assert isinstance(choice, Shortage)
