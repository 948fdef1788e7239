"""A prefill and a decode side without tensors: random arrivals, hand-offs that fail in every way, aborts, preemption.

After every action all invariants hold; in the end every request is over and no block is lost.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from llm_engine.sched.decode import DecodeScheduler
from llm_engine.sched.paged_cache import PagedCache
from llm_engine.sched.prefill import PrefillScheduler
from llm_engine.sched.reservations import Reservations
from llm_engine.sched.sequence import Phase, Reservation, Sequence
from tests.unit.sched.requests import sequence_of

BLOCK = 4
MAX_ACTIVE = 4


@dataclass
class Side:
    """One worker's scheduling state."""

    cache: PagedCache
    prefill: PrefillScheduler
    decode: DecodeScheduler
    reservations: Reservations

    @classmethod
    def make(cls, num_blocks: int, rng: random.Random) -> Side:
        cache = PagedCache(num_blocks, BLOCK, format_id="f")
        prefill = PrefillScheduler(cache, max_step_tokens=rng.choice([5, 16, 64]), max_waiting=10)
        decode = DecodeScheduler(cache, num_drafts=rng.randint(0, 3), max_len=60)
        return cls(cache, prefill, decode, Reservations(cache))

    def check(self) -> None:
        self.cache.check()
        self.prefill.check()
        self.decode.check()


@dataclass
class Cluster:
    rng: random.Random
    p: Side
    d: Side
    sending: list[Sequence] = field(default_factory=list)  # prefilled, no reservation yet
    receiving: list[tuple[Sequence, Reservation]] = field(default_factory=list)
    quarantined: list[Reservation] = field(default_factory=list)
    num_over: int = 0

    def act(self, seq: Sequence | None) -> None:
        """One random action; `seq` arrives if there is one."""
        if seq is not None and self.p.prefill.add(seq) is not None:
            self.num_over += 1
        action = self.rng.choice(["prefill", "prefill", "reserve", "land", "decode", "decode", "abort", "fence"])
        getattr(self, f"_{action}")()
        self.p.check()
        self.d.check()

    def _prefill(self) -> None:
        chunks = self.p.prefill.plan(MAX_ACTIVE)
        for seq in self.p.prefill.commit(chunks):
            self.sending.append(seq)

    def _reserve(self) -> None:
        if not self.sending or len(self.d.decode.running) + self.d.reservations.num_reserved >= MAX_ACTIVE:
            return
        seq = self.sending[0]
        digests = self.d.cache.digests(seq.tokens, seq.submit.salt)
        reservation = self.d.reservations.take(
            seq.request_id,
            seq.attempt,
            len(seq.tokens),
            digests,
            deadline=seq.deadline,
            headroom=len(self.d.decode.running),
        )
        if reservation is not None:
            self.sending.pop(0)
            assert len(reservation.hits) + len(reservation.blocks) == self.d.cache.blocks_for(len(seq.tokens))
            self.receiving.append((seq, reservation))

    def _land(self) -> None:
        """A hand-off is committed, withdrawn, or revoked with its writer still at large."""
        if not self.receiving:
            return
        source, reservation = self.receiving.pop(self.rng.randrange(len(self.receiving)))
        outcome = self.rng.random()
        if outcome < 0.7:
            seq = sequence_of(source.tokens, source.request_id, max_tokens=source.submit.sampling.max_tokens)
            self.d.reservations.adopt(seq, reservation)
            seq.tokens.append(1)
            self.d.decode.add(seq)
        else:
            self.d.reservations.release(reservation, quarantine=outcome > 0.85)
            if outcome > 0.85:
                self.quarantined.append(reservation)
            self.num_over += 1
        self.p.cache.free(source)

    def _fence(self) -> None:
        if self.quarantined:
            self.d.reservations.free(self.quarantined.pop())

    def _decode(self) -> None:
        plan = self.d.decode.plan()
        self.num_over += len(plan.preempted)
        for seq, num_drafts in zip(plan.seqs, plan.num_drafts, strict=True):
            num_new = 1 + self.rng.randint(0, num_drafts)
            seq.tokens += self.rng.choices(range(3), k=num_new)
            self.d.decode.commit(seq, num_new)
            assert seq.num_output <= seq.submit.sampling.max_tokens
            if seq.num_output == seq.submit.sampling.max_tokens or len(seq.tokens) == 60:
                self.d.decode.remove(seq)
                self.d.cache.free(seq)
                self.num_over += 1

    def _abort(self) -> None:
        for side, seqs in (
            (self.p, [*self.p.prefill.waiting, *self.p.prefill.active]),
            (self.d, self.d.decode.running),
        ):
            if seqs and self.rng.random() < 0.2:
                seq = self.rng.choice(seqs)
                (side.decode if seq.phase is Phase.DECODING else side.prefill).remove(seq)
                side.cache.free(seq)
                self.num_over += 1


@pytest.mark.parametrize("seed", range(25))
def test_churn_loses_nothing(seed: int) -> None:
    rng = random.Random(seed)
    cluster = Cluster(rng, Side.make(rng.choice([10, 16, 40]), rng), Side.make(rng.choice([10, 16, 40]), rng))
    num_requests = 60
    for i in range(num_requests):
        family = rng.randrange(3)
        prompt = [family] * rng.randint(1, 20) + [rng.randrange(3) for _ in range(rng.randint(0, 15))]
        cluster.act(sequence_of(prompt, f"r{i}", max_tokens=rng.randint(2, 20)))
        for _ in range(rng.randrange(8)):
            cluster.act(None)
    for _ in range(20_000):
        if cluster.num_over == num_requests:
            break
        cluster.act(None)
    assert cluster.num_over == num_requests
    while cluster.quarantined:
        cluster._fence()
    for side in (cluster.p, cluster.d):
        counts = side.cache.pool.counts()
        assert (counts.live, counts.leased, counts.quarantined) == (0, 0, 0)
        assert counts.free + counts.cached == side.cache.pool.num_blocks
