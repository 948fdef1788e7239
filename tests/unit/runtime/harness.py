"""Drives engines in tests: builds them, collects what they report, and knows what they should have said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from llm_engine.api.config import ClusterConfig, build
from llm_engine.api.messages import Role, Submit
from llm_engine.api.request import FinishReason, TokenDelta, unpack_tokens
from llm_engine.runtime.draws import DrawRows
from llm_engine.runtime.engine import Engine
from llm_engine.runtime.kv_store import KvStore
from llm_engine.runtime.runner import Model
from llm_engine.runtime.sampler import Sampler
from llm_engine.sched import Failure, LayerSink, Prefilled, Reservation, Sequence, StepResult
from tests.unit.runtime.fake_model import (
    BLOCK,
    EOS,
    VOCAB,
    FakeModel,
    LateModel,
    advance,
    copy_block,
    logits_of,
    make_store,
)
from tests.unit.sched.requests import submit_of


def config_of(
    *, num_drafts: int = 0, chunk: int = 16, max_num_seqs: int = 8, max_waiting: int = 512, prefix_cache: bool = True
) -> ClusterConfig:
    """A configuration for an engine of a test; the model's path is not read."""
    return build(
        {
            "model": {"path": "unused"},
            "engine": {"num_drafts": num_drafts},
            "kv": {"prefix_cache": prefix_cache},
            "scheduler": {"max_step_tokens": chunk, "max_num_seqs": max_num_seqs, "max_waiting": max_waiting},
        }
    )


@dataclass
class Driver:
    """An engine and everything it has reported."""

    engine: Engine
    outputs: dict[str, list[int]] = field(default_factory=dict)  # by request: output tokens, whatever the attempt
    finishes: dict[str, FinishReason] = field(default_factory=dict)
    deltas: list[TokenDelta] = field(default_factory=list)
    prefilled: list[Prefilled] = field(default_factory=list)
    failed: list[Failure] = field(default_factory=list)
    results: list[StepResult] = field(default_factory=list)
    late: LateModel | None = None  # the model, if its passes go ahead
    waited: bool = False  # for the pass under way

    def add(self, submit: Submit) -> Sequence:
        seq = self.engine.add(submit)
        assert isinstance(seq, Sequence), seq
        self.outputs.setdefault(submit.request_id, unpack_tokens(submit.tokens)[submit.num_prompt :])
        return seq

    def wait(self) -> None:
        """Until the pass under way has ended, which writes as late as it can."""
        if self.late is not None and self.engine.under_way and not self.waited:
            self.late.land()
        self.waited = True
        self.engine.wait()

    def step(self) -> StepResult | None:
        """One step, all invariants checked; output indices must leave no gap and never contradict each other."""
        self.wait()
        self.waited = False
        result = self.engine.step()
        self.engine.check()
        if result is None:
            return None
        self.results.append(result)
        for delta in (delta for deltas in result.deltas.values() for delta in deltas):
            self.deltas.append(delta)
            output = self.outputs.setdefault(delta.request_id, [])
            assert delta.index <= len(output), "a delta left a gap"
            assert output[delta.index :] == delta.tokens[: len(output) - delta.index], "a token was changed"
            output += delta.tokens[len(output) - delta.index :]
            if delta.finish is not None:
                self.finishes[delta.request_id] = delta.finish
        self.prefilled += result.prefilled
        self.failed += result.failed
        return result

    def run(self, max_steps: int = 2000) -> None:
        """Step until nothing happens any more."""
        for _ in range(max_steps):
            if self.step() is None:
                return
        raise AssertionError("the engine does not come to rest")


def fake_driver(
    role: Role = Role.AGGREGATED,
    *,
    num_blocks: int = 64,
    num_drafts: int = 0,
    model: Model | None = None,
    store: KvStore | None = None,
    on_layer: LayerSink | None = None,
    clock: Callable[[], float] = lambda: 0.0,
    ahead: bool = False,
    **options: Any,
) -> Driver:
    """A driver of an engine over the fake model. `ahead`: see `Engine`; passes then end as late as they can."""
    config = config_of(num_drafts=num_drafts, **options)
    store = store if store is not None else make_store(num_blocks, with_mtp=num_drafts > 0)
    model = model if model is not None else LateModel() if ahead else FakeModel()
    engine = Engine(config, model, store, role=role, format_id="fake", on_layer=on_layer, ahead=ahead, clock=clock)
    return Driver(engine, late=model if isinstance(model, LateModel) else None)


def expected_output(submit: Submit, max_len: int = 64) -> list[int]:
    """All output tokens of a request on the fake model, one by one, from the definition."""
    seq = Sequence.from_submit(submit, 0.0)
    params = submit.sampling
    seq.stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else {EOS})
    seq.slot = 0
    sampler = Sampler(1, VOCAB, torch.device("cpu"))
    sampler.open(seq)
    state = 0
    for token in seq.tokens:
        state = advance(state, token)
    while True:
        logits = logits_of(torch.tensor([[float(state), 0.0]]))
        token = sampler.draw(logits, DrawRows([seq], [0], [1])).tokens[0]
        seq.tokens.append(token)
        state = advance(state, token)
        if token in seq.stop_ids or seq.num_output >= params.max_tokens or len(seq.tokens) >= max_len:
            return seq.tokens[submit.num_prompt :]


def blocks_in_use(engine: Engine) -> int:
    """Blocks that are neither free nor cached."""
    load = engine.load()
    return load.blocks_live + load.blocks_leased + load.blocks_quarantined


PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def prompt_of(name: str = "r", tokens: list[int] | None = None, **options: Any) -> Submit:
    """A request of `PROMPT` for 12 tokens that only `max_tokens` ends, unless told otherwise."""
    return submit_of(tokens or PROMPT, name, **{"max_tokens": 12, "ignore_eos": True, **options})


def fake_pair(
    *submits: Submit, num_drafts: int = 0, num_blocks: int = 32, **options: Any
) -> tuple[Driver, Driver, list[KvStore]]:
    """A prefill engine that has computed these requests, a decode engine (with further options), and their stores."""
    stores = [make_store(num_blocks, with_mtp=num_drafts > 0) for _ in range(2)]
    p = fake_driver(Role.PREFILL, store=stores[0], num_drafts=num_drafts)
    d = fake_driver(Role.DECODE, store=stores[1], num_drafts=num_drafts, **options)
    for submit in submits:
        p.add(submit)
    p.run()
    return p, d, stores


def hand_over(p: Driver, d: Driver, stores: list[KvStore], index: int = 0) -> tuple[Sequence, Reservation]:
    """Move a prefilled sequence from one engine to the other."""
    prefilled = p.prefilled[index]
    seq = prefilled.seq
    reservation = d.engine.reserve(seq.submit, len(unpack_tokens(seq.submit.tokens)))
    assert isinstance(reservation, Reservation)
    for i, block in enumerate(reservation.blocks, reservation.have_tokens // BLOCK):
        copy_block(stores[0], seq.blocks[i], stores[1], block)
    return d.engine.admit(seq.submit, reservation, prefilled.first), reservation
