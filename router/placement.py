"""Sends an attempt: shows the living workers to the policy, books the chosen pair, submits to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llm_engine.api.messages import Peer, Role, Submit
from llm_engine.api.request import pack_tokens
from router.flight import Flight
from router.ledger import Booking
from router.membership import Membership
from router.policy import Choice, DecodeState, Demand, Policy, PrefillState, Shortage, blocks_needed, kind, max_tokens
from router.worker import Worker

MAX_TRIES = 4  # workers whose send queue is full before the attempt waits for the next occasion


@dataclass(frozen=True, slots=True)
class Placement:
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

    def longest_sequence(self) -> int | None:
        """Most tokens any known decoding worker, alive or not, can hold; None while none is known."""
        infos = (worker.info for worker in self._membership.workers)
        return max((max_tokens(i) for i in infos if i is not None and i.role is not Role.PREFILL), default=None)

    def place(self, flight: Flight) -> Placement | Shortage:
        """Choose a pair and submit the flight's next attempt to it. Workers that can't be sent to are passed over."""
        unreachable: set[Worker] = set()
        for _ in range(MAX_TRIES):
            candidates = _Candidates(self._membership, flight, unreachable)
            choice = self._policy(candidates.demand, candidates.prefills, candidates.decodes, candidates.aggregated)
            if isinstance(choice, Shortage):
                return choice
            placement = candidates.placement(choice)
            if placement.prefill.send(self._submit(flight, placement)):
                placement.booking.open()
                return placement
            unreachable.add(placement.prefill)
        return Shortage.NO_PAIR

    def _submit(self, flight: Flight, placement: Placement) -> Submit:
        journal, decode = flight.journal, placement.decode.info
        assert decode is not None
        peer = Peer(name=decode.name, incarnation=decode.incarnation, control_addr=decode.control_addr)
        return Submit(
            request_id=journal.request_id,
            attempt=journal.attempt + 1,
            router_id=self._router_id,
            tokens=journal.prompt + pack_tokens(journal.output) if journal.output else journal.prompt,
            num_prompt=journal.num_prompt,
            sampling=journal.sampling,
            deadline_s=max(0.001, flight.deadline - self._membership.clock()),
            salt=journal.salt,
            decode=None if placement.decode is placement.prefill else peer,
        )


class _Candidates:
    """The usable workers as the policy sees them, for one flight."""

    def __init__(self, membership: Membership, flight: Flight, unreachable: set[Worker]) -> None:
        journal = flight.journal
        self.demand = Demand(len(flight.tokens), journal.num_left, flight.avoid)
        self._flight = flight
        self._prefill_workers = [w for w in membership.pool(Role.PREFILL) if w not in unreachable]
        self._decode_workers = membership.pool(Role.DECODE)
        self._both_workers = [w for w in membership.pool(Role.AGGREGATED) if w not in unreachable]
        self.prefills: Sequence[PrefillState] = [self._prefill(w) for w in self._prefill_workers]
        self.decodes: Sequence[DecodeState] = [self._decode(w) for w in self._decode_workers]
        self.aggregated = [(self._prefill(w), self._decode(w)) for w in self._both_workers]

    def placement(self, choice: Choice) -> Placement:
        if choice.decode is None:
            prefill = decode = self._both_workers[choice.prefill]
            state = self.aggregated[choice.prefill][1]
        else:
            prefill, decode = self._prefill_workers[choice.prefill], self._decode_workers[choice.decode]
            state = self.decodes[choice.decode]
        booking = Booking(
            prefill=prefill.ledger,
            decode=decode.ledger,
            prefix=prefill.prefix,
            tokens=self.demand.num_tokens - choice.hit_tokens,
            blocks=blocks_needed(self.demand, state),
            digests=self._digests(prefill) if prefill.prefix.in_step else (),
        )
        return Placement(prefill, decode, booking, choice.hit_tokens, choice.ttft_s)

    def _digests(self, worker: Worker) -> list[bytes]:
        assert worker.info is not None
        return self._flight.chain.digests(self._flight.tokens, worker.info.format_id, worker.info.block_tokens)

    def _hit_tokens(self, worker: Worker) -> int:
        assert worker.info is not None
        hit = worker.prefix.match(self._digests(worker)) * worker.info.block_tokens
        return min(hit, self.demand.num_tokens - 1)  # the last position is always computed

    def _prefill(self, worker: Worker) -> PrefillState:
        assert worker.info is not None
        return PrefillState(
            info=worker.info,
            backlog_tokens=worker.ledger.backlog_tokens(worker.load),
            tokens_per_s=worker.load.prefill_tokens_per_s,
            hit_tokens=self._hit_tokens(worker),
            bad_peers=worker.load.bad_peers,
        )

    def _decode(self, worker: Worker) -> DecodeState:
        assert worker.info is not None
        return DecodeState(
            info=worker.info,
            num_seqs=worker.ledger.seqs(worker.load),
            blocks_available=worker.ledger.blocks_available(worker.load),
            idle=worker.ledger.idle(worker.load),
            step_s=worker.load.step_s,
            hit_tokens=self._hit_tokens(worker),
        )
