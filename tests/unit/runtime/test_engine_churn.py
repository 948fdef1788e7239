"""Whole engines on the fake model under random load: every output token is the one plain decoding draws.

Requests share prefixes, arrive in bursts, are cancelled, preempted and retried with the tokens they had. In the
disaggregated runs hand-offs land late, fail, or leave a writer at large.
"""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Sequence as Seq
from typing import Any

import msgspec
import pytest

from llm_engine.api.messages import Role, Submit
from llm_engine.api.request import FinishReason, pack_tokens, unpack_tokens
from llm_engine.runtime.kv_store import KvStore
from llm_engine.sched import Prefilled, Refusal, Reservation, Sequence
from tests.unit.runtime.fake_model import (
    BLOCK,
    EOS,
    NUM_LAYERS,
    VOCAB,
    FakeModel,
    LateModel,
    block_bytes,
    copy_block,
    make_store,
)
from tests.unit.runtime.harness import blocks_in_use, expected_output, fake_driver
from tests.unit.sched.requests import submit_of

NUM_REQUESTS = 24


def _random_submit(rng: random.Random, name: str) -> Submit:
    """A prompt of 1 to 40 tokens, often with a prefix that others have, and random sampling."""
    family = [rng.randrange(2)] * rng.choice([0, 3, 4, 9, 16, 25])
    prompt = [*family, *(rng.randrange(VOCAB) for _ in range(rng.randint(1, 15)))]
    options: dict[str, Any] = {
        "temperature": rng.choice([0.0, 0.7, 1.5]),
        "seed": rng.randrange(1000),
        "max_tokens": rng.randint(1, 30),
        "ignore_eos": rng.random() < 0.3,
    }
    if rng.random() < 0.3:
        options |= {"presence_penalty": 0.7, "frequency_penalty": 0.3}
    if rng.random() < 0.3:
        options |= {"min_tokens": rng.randint(1, 9), "stop_token_ids": (3, 5)}
    if rng.random() < 0.2:
        options |= {"top_k": 5, "top_p": 0.9, "logprobs": 2}
    return submit_of(prompt, name, salt=rng.choice(["", "", "tenant"]), **options)


class Client:
    """A router in miniature: sends requests again with what they have, and compares outputs with the definition."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.submits = {f"r{i}": _random_submit(rng, f"r{i}") for i in range(NUM_REQUESTS)}
        self.expected = {name: expected_output(submit) for name, submit in self.submits.items()}
        self.attempts = dict.fromkeys(self.submits, 0)
        self.to_send = list(self.submits)
        self.cancelled: set[str] = set()
        self.num_retries = 0

    def next_submit(self, outputs: dict[str, list[int]]) -> Submit | None:
        """The next request to send, continuing where its last attempt ended."""
        if not self.to_send:
            return None
        name = self.to_send.pop(0)
        self.attempts[name] += 1
        first = self.submits[name]
        tokens = first.tokens + pack_tokens(outputs.get(name, []))
        return msgspec.structs.replace(first, attempt=self.attempts[name], tokens=tokens)

    def retry(self, name: str) -> None:
        self.num_retries += 1
        self.to_send.append(name)

    def verify(self, outputs: dict[str, list[int]], finishes: dict[str, FinishReason]) -> None:
        """Every request is over and said what it had to say."""
        for name, expected in self.expected.items():
            output = outputs.get(name, [])
            if name in self.cancelled:
                assert output == expected[: len(output)], name
                continue
            assert output == expected, name
            params = self.submits[name].sampling
            stopped = expected[-1] in params.stop_token_ids or (expected[-1] == EOS and not params.ignore_eos)
            assert finishes[name] == (FinishReason.STOP if stopped else FinishReason.LENGTH)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_aggregated(seed: int, ahead: bool) -> None:
    rng = random.Random(seed)
    driver = fake_driver(
        num_blocks=rng.choice([16, 20, 64]),
        num_drafts=rng.choice([0, 1, 3]),
        chunk=rng.choice([16, 24, 48]),
        max_num_seqs=rng.choice([2, 8]),
        ahead=ahead,
    )
    client = Client(rng)
    for _ in range(20_000):
        if rng.random() < 0.5 and (submit := client.next_submit(driver.outputs)) is not None:
            driver.add(submit)
        if rng.random() < 0.01 and driver.outputs:
            name = rng.choice(list(driver.outputs))
            if driver.engine.abort(name, client.attempts[name]) is not None:
                client.cancelled.add(name)
        result = driver.step()
        for failure in result.failed if result else ():
            assert (failure.code, failure.retryable) == ("preempted", True)
            client.retry(failure.seq.request_id)
        if driver.engine.is_idle and not client.to_send:
            break
    client.verify(driver.outputs, driver.finishes)
    assert blocks_in_use(driver.engine) == 0
    assert not any(
        delta.logprobs for delta in driver.deltas if client.submits[delta.request_id].sampling.logprobs is None
    )


class Sink:
    """Notes what may be sent, with the bytes at that moment: they must be final."""

    def __init__(self, store: KvStore) -> None:
        self._store = store
        self.reported: dict[Sequence, dict[tuple[int, int], tuple[int, bytes]]] = defaultdict(dict)

    def started(self, seq: Sequence) -> None:
        assert seq not in self.reported
        assert len(seq.blocks) == -(-len(seq.tokens) // BLOCK)
        self.reported[seq] = {}

    def layers_ready(self, seq: Sequence, layers: range, first_block_index: int, block_ids: Seq[int]) -> None:
        for layer, (index, block) in itertools.product(layers, enumerate(block_ids, first_block_index)):
            assert seq.blocks[index] == block
            assert (layer, index) not in self.reported[seq], "reported twice"
            self.reported[seq][layer, index] = block, block_bytes(self._store, layer, block)

    def verify(self, seq: Sequence, num_layers: int) -> None:
        """Everything was reported, and nothing has changed since."""
        assert set(self.reported[seq]) == {(layer, i) for layer in range(num_layers) for i in range(len(seq.blocks))}
        for (layer, _), (block, content) in self.reported[seq].items():
            assert block_bytes(self._store, layer, block) == content, f"layer {layer} changed after it was reported"


class Pair:
    """A prefill and a decode engine with a hand-off between them that goes wrong in every way it can."""

    def __init__(self, rng: random.Random, num_drafts: int, ahead: bool) -> None:
        self.rng = rng
        self.num_layers = NUM_LAYERS + (num_drafts > 0)
        self.stores = [make_store(rng.choice([16, 64]), with_mtp=num_drafts > 0) for _ in range(2)]
        self.sink = Sink(self.stores[0])
        models = [FakeModel(row_tile=4), LateModel(row_tile=1) if ahead else FakeModel(row_tile=1)]
        options: dict[str, Any] = {"num_drafts": num_drafts, "max_num_seqs": rng.choice([2, 6])}
        self.p = fake_driver(
            Role.PREFILL,
            store=self.stores[0],
            model=models[0],
            on_layer=self.sink,
            chunk=rng.choice([16, 24]),
            **options,
        )
        self.d = fake_driver(Role.DECODE, store=self.stores[1], model=models[1], ahead=ahead, **options)
        self.d.outputs = self.p.outputs  # both report to the same router
        self.sent: list[Prefilled] = []
        self.landing: list[tuple[Prefilled, Reservation]] = []
        self.quarantined: list[Reservation] = []

    def reserve(self, client: Client) -> None:
        """Offer the oldest hand-off to the decode side."""
        if not self.sent:
            return
        prefilled = self.sent[0]
        seq = prefilled.seq
        tokens = unpack_tokens(seq.submit.tokens)
        self.sink.verify(seq, self.num_layers)
        outcome = self.d.engine.reserve(seq.submit, len(tokens))
        assert not isinstance(outcome, Refusal), outcome
        if outcome is not None:
            assert outcome.have_tokens + len(outcome.blocks) * BLOCK >= len(tokens)
            self.sent.pop(0)
            self.landing.append((prefilled, outcome))

    def land(self, client: Client) -> None:
        """One open hand-off succeeds, is withdrawn, or is revoked while its writer may still write."""
        if not self.landing:
            return
        prefilled, reservation = self.landing.pop(self.rng.randrange(len(self.landing)))
        seq = prefilled.seq
        outcome = self.rng.random()
        if outcome < 0.8 and self.p.engine.abort(seq.request_id, seq.attempt) is seq:
            for index, block in enumerate(reservation.blocks, reservation.have_tokens // BLOCK):
                copy_block(self.stores[0], seq.blocks[index], self.stores[1], block)
            self.d.engine.admit(seq.submit, reservation, prefilled.first)
        else:
            self.d.engine.release_reservation(reservation, quarantine=outcome > 0.9)
            if outcome > 0.9:
                self.quarantined.append(reservation)
            self.p.engine.abort(seq.request_id, seq.attempt)
            client.retry(seq.request_id)
        self.p.engine.release_sent(seq)
        self.p.engine.check()
        self.d.engine.check()

    def fence(self, client: Client) -> None:
        """A writer is proven stopped; until then it scribbles over the blocks it was lent."""
        if not self.quarantined:
            return
        for reservation in self.quarantined:
            for block in reservation.blocks:
                self.stores[1].layers[0].latent[block] = -7.0
        self.d.engine.free_quarantined(self.quarantined.pop())

    def prefill(self, client: Client) -> None:
        result = self.p.step()
        if result is None:
            return
        self.sent += result.prefilled
        for seq in result.finished:
            self.p.engine.release_sent(seq)

    def decode(self, client: Client) -> None:
        result = self.d.step()
        for failure in result.failed if result else ():
            assert failure.code == "preempted"
            client.retry(failure.seq.request_id)

    def wait(self, client: Client) -> None:
        """Commands that come before the step find a pass that has ended."""
        self.d.wait()

    def cancel(self, client: Client) -> None:
        """A client goes away while a pass computes its token, and hand-offs land in the room that there is."""
        running = [seq.request_id for seq in self.d.engine._decode.running]
        if not running or len(client.cancelled) > NUM_REQUESTS // 2:
            return
        name = self.rng.choice(running)
        assert self.d.engine.abort(name, client.attempts[name]) is not None
        client.cancelled.add(name)
        for _ in range(3):
            self.reserve(client)
            self.land(client)

    @property
    def is_idle(self) -> bool:
        return self.p.engine.is_idle and self.d.engine.is_idle and not self.sent


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_disaggregated(seed: int, ahead: bool) -> None:
    rng = random.Random(100 + seed)
    pair, client = Pair(rng, rng.choice([0, 1, 3]), ahead), Client(rng)
    acts = [pair.prefill, pair.prefill, pair.reserve, pair.land, pair.fence, pair.decode, pair.decode]
    acts += [pair.cancel, pair.wait] if ahead else []
    for _ in range(40_000):
        if rng.random() < 0.3 and (submit := client.next_submit(pair.p.outputs)) is not None:
            pair.p.add(submit)
        rng.choice(acts)(client)
        if pair.is_idle and not client.to_send:
            break
    client.verify(pair.p.outputs, pair.p.finishes | pair.d.finishes)
    assert blocks_in_use(pair.p.engine) == blocks_in_use(pair.d.engine) == 0
