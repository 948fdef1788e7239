"""Sends an attempt: shows the living workers to the policy, books the chosen pair, submits to it."""

from __future__ import annotations

import msgspec

from llm_engine.api.messages import Role, Submit
from llm_engine.api.request import pack_tokens
from router.flight import Flight
from router.ledger import Booking
from router.membership import Membership
from router.policy import DecodeState, Demand, Policy, PrefillState, Shortage, blocks_needed, kind, max_tokens
from router.worker import Worker

MAX_TRIES = 4  # workers whose send queue is full before the attempt waits for the next occasion


class Placement(msgspec.Struct, frozen=True):
    """Where an attempt was sent. `decode` is `prefill` when one worker does both."""

    prefill: Worker
    decode: Worker
    booking: Booking
    hit_tokens: int
    ttft_s: float  # predicted


class Placer:
    """Finds places for flights among the members."""

    def __init__(self, membership: Membership, router_id: str, policy: Policy) -> None:
        self._membership = membership
        self._router_id = router_id
        self._policy = policy

    def has_pair(self) -> bool:
        """Whether a compatible pair, or a worker that does both, takes new work."""
        if self._membership.pool(Role.AGGREGATED):
            return True
        prefills = {kind(w.info) for w in self._membership.pool(Role.PREFILL) if w.info is not None}
        return any(kind(w.info) in prefills for w in self._membership.pool(Role.DECODE) if w.info is not None)

    def capacity(self) -> int:
        """Sequences that the usable workers can hold at once; 0 without a pair."""
        if not self.has_pair():
            return 0
        return sum(
            worker.info.max_num_seqs for worker in self._membership.workers if worker.usable and worker.info is not None
        )

    def cache_in_use(self) -> tuple[str, int] | None:
        """Format id and block size of the prefix caches; None without one. There are several during a rollout only."""
        for role in (Role.PREFILL, Role.AGGREGATED):
            for worker in self._membership.pool(role):
                return worker.known.format_id, worker.known.block_tokens
        return None

    def longest_sequence(self) -> int | None:
        """Most tokens any known decoding worker, alive or not, can hold; None while none is known."""
        infos = (worker.info for worker in self._membership.workers)
        return max((max_tokens(i) for i in infos if i is not None and i.role is not Role.PREFILL), default=None)

    def place(self, flight: Flight) -> Placement | Shortage:
        """Choose a pair and submit the flight's next attempt to it. Workers that can't be sent to are passed over."""
        pool = self._membership.pool
        demand = Demand(len(flight.tokens), flight.journal.num_left, flight.avoid)
        prefills, decodes, both = pool(Role.PREFILL), pool(Role.DECODE), pool(Role.AGGREGATED)
        # A new worker is taken to be as fast as the fastest: a slower guess would keep it idle, and so stay a guess.
        rate = max((worker.load.prefill_tokens_per_s for worker in (*prefills, *both)), default=0.0)
        step_s = min((t for worker in (*decodes, *both) if (t := worker.load.step_s) > 0), default=0.0)
        for _ in range(MAX_TRIES):
            prefill_states = [_prefill_state(worker, flight, rate) for worker in prefills]
            decode_states = [_decode_state(worker, flight, step_s) for worker in decodes]
            both_states = [
                (_prefill_state(worker, flight, rate), _decode_state(worker, flight, step_s)) for worker in both
            ]
            choice = self._policy(demand, prefill_states, decode_states, both_states)
            if isinstance(choice, Shortage):
                return choice
            if choice.decode is None:
                prefill = decode = both[choice.prefill]
                blocks = blocks_needed(demand, both_states[choice.prefill][1])
            else:
                prefill, decode = prefills[choice.prefill], decodes[choice.decode]
                blocks = blocks_needed(demand, decode_states[choice.decode])
            if prefill.send(self._submit(flight, prefill, decode)):
                booking = Booking(
                    prefill.ledger,
                    decode.ledger,
                    prefill.prefix,
                    demand.num_tokens - choice.hit_tokens,
                    blocks,
                    _digests(prefill, flight) if prefill.prefix.in_step else (),
                )
                booking.open()
                return Placement(prefill, decode, booking, choice.hit_tokens, choice.ttft_s)
            prefills = [worker for worker in prefills if worker is not prefill]
            both = [worker for worker in both if worker is not prefill]
        return Shortage.NO_PAIR

    def _submit(self, flight: Flight, prefill: Worker, decode: Worker) -> Submit:
        journal = flight.journal
        return Submit(
            request_id=journal.request_id,
            attempt=journal.attempt + 1,
            router_id=self._router_id,
            tokens=journal.prompt + pack_tokens(journal.output) if journal.output else journal.prompt,
            num_prompt=journal.num_prompt,
            sampling=journal.sampling,
            deadline_s=max(0.001, flight.deadline - self._membership.clock()),
            salt=journal.salt,
            decode=None if decode is prefill else decode.peer,
        )


def _prefill_state(worker: Worker, flight: Flight, rate: float) -> PrefillState:
    load = worker.load
    return PrefillState(
        worker.known, worker.ledger.backlog_tokens(load), load.prefill_tokens_per_s or rate,
        _hit_tokens(worker, flight), load.bad_peers,
    )  # fmt: skip


def _decode_state(worker: Worker, flight: Flight, step_s: float) -> DecodeState:
    load, ledger = worker.load, worker.ledger
    return DecodeState(
        worker.known, ledger.seqs(load), ledger.blocks_available(load), ledger.idle(load), load.step_s or step_s,
        _hit_tokens(worker, flight),
    )  # fmt: skip


def _hit_tokens(worker: Worker, flight: Flight) -> int:
    digests = _digests(worker, flight)
    if not digests:
        return 0
    hit = worker.prefix.match(digests) * worker.known.block_tokens
    return min(hit, len(flight.tokens) - 1)  # the last position is always computed


def _digests(worker: Worker, flight: Flight) -> list[bytes]:
    info = worker.known
    return flight.chain.digests(flight.tokens, info.format_id, info.block_tokens)
