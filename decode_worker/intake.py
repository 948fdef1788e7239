"""The engine's blocks as the hand-off sees them: each call becomes a command of the step loop, in order of calls.

Peers write into the engine's own blocks. Where these lie on a card, peers write into slots of host memory instead,
which are copied to the card before the engine admits the sequence.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

from kv_transfer.metrics import HandoffReport
from llm_engine.api.errors import LeaseRevoked, Overloaded, PromptTooLong, ProtocolError, ServingError, TransferError
from llm_engine.api.handoff import FirstToken
from llm_engine.api.hashing import split_digests
from llm_engine.api.messages import Submit
from llm_engine.api.request import SamplingParams, pack_tokens
from llm_engine.runtime.engine import Engine
from llm_engine.sched import Refusal, Reservation, StepResult
from llm_engine.serving.staging import Inbound
from llm_engine.serving.step_loop import StepLoop

_PROBE_PREFIX = "\x00probe-"  # no request id of a router starts with a zero byte


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Where one hand-off lands. `kv_transfer.reserver.ReservedBlocks`."""

    reservation: Reservation
    blocks: Seq[int]  # of the region that peers write into

    @property
    def have_tokens(self) -> int:
        """Tokens found in the own prefix cache."""
        return self.reservation.have_tokens


class Owner(Protocol):
    """What the decode worker decides about an incoming sequence. On the asyncio thread."""

    def may_reserve(self, submit: Submit) -> None:
        """Raises ServingError if the attempt is stale or its router can't be reached."""

    def reserved(self, submit: Submit, reservation: Reservation) -> bool:
        """Blocks are set aside. False: the request has ended meanwhile."""

    def dropped(self, reservation: Reservation) -> None:
        """The hand-off has ended without a sequence."""

    def may_admit(self, submit: Submit) -> bool:
        """Whether the attempt still is live."""

    def admitted(self, submit: Submit, report: HandoffReport) -> None:
        """The engine owns the sequence; called before any of its deltas is delivered."""


class Intake:
    """`kv_transfer.receiver.BlockReserver` on top of a step loop."""

    def __init__(
        self,
        steps: StepLoop[Engine, StepResult],
        owner: Owner,
        *,
        block_tokens: int,
        on_blocks_freed: Callable[[], None],
        staged: Inbound | None = None,
    ) -> None:
        """`staged`: the slots of host memory, with caches on a card."""
        self._staged = staged
        self._steps = steps
        self._owner = owner
        self._block_tokens = block_tokens
        self._on_blocks_freed = on_blocks_freed

    async def reserve(self, submit: Submit, num_tokens: int, digests: bytes) -> Place | None:
        """`BlockReserver`."""
        self._owner.may_reserve(submit)
        if self._staged is not None and not self._staged.is_prepared:
            await asyncio.to_thread(self._staged.prepare)
        each = split_digests(digests)
        outcome = await self._steps.call(lambda engine: engine.reserve(submit, num_tokens, each))
        if outcome is None:
            return None
        if isinstance(outcome, Refusal):
            raise _refused(outcome, submit)
        place = self._place(outcome)
        if place is None:
            self._give_back(outcome)
            return None
        if not self._owner.reserved(submit, outcome):
            self._give_slots(place)
            self._give_back(outcome)
            raise LeaseRevoked("the request ended while blocks were being reserved", request_id=submit.request_id)
        return place

    async def reserve_probe(self) -> Place | None:
        """`BlockReserver`: one block that no request can share; none before a hand-off has come this way."""
        if self._staged is not None and not self._staged.is_prepared:
            return None
        probe = Submit(
            request_id=_PROBE_PREFIX + secrets.token_hex(8),
            attempt=0,
            router_id="",
            tokens=pack_tokens([0] * self._block_tokens),
            num_prompt=self._block_tokens,
            sampling=SamplingParams(seed=0, max_tokens=1),
            deadline_s=60.0,
            salt=secrets.token_hex(8),
        )
        outcome = await self._steps.call(lambda engine: engine.reserve(probe, self._block_tokens))
        if not isinstance(outcome, Reservation):
            return None
        place = self._place(outcome)
        if place is None:
            self._give_back(outcome)
        return place

    def prepare(self, submit: Submit, place: Place) -> None:
        """`BlockReserver`."""
        reservation = place.reservation
        self._steps.post(lambda engine: engine.expect(submit, reservation))

    async def admit(self, submit: Submit, place: Place, first: FirstToken, report: HandoffReport) -> None:
        """`BlockReserver`: returns once the engine has taken the sequence."""
        if not self._owner.may_admit(submit):
            raise LeaseRevoked("the request has ended", request_id=submit.request_id)
        reservation = place.reservation
        if self._staged is not None:
            await asyncio.to_thread(self._staged.load, place.blocks, reservation.blocks)
        outcome: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def admit(engine: Engine) -> ServingError | None:
            try:
                engine.admit(submit, reservation, first)
            except ValueError as exc:
                return ProtocolError(f"commit does not fit: {exc}", request_id=submit.request_id)
            return None

        def done(error: ServingError | None) -> None:
            if error is None:
                self._owner.admitted(submit, report)
            if outcome.done():
                return
            if error is None:
                outcome.set_result(None)
            else:
                outcome.set_exception(error)

        self._steps.post(admit, done)
        await outcome
        self._give_slots(place)

    def release(self, place: Place) -> None:
        """`BlockReserver`."""
        self._owner.dropped(place.reservation)
        self._give_slots(place)
        self._give_back(place.reservation)

    def quarantine(self, place: Place) -> None:
        """`BlockReserver`."""
        self._owner.dropped(place.reservation)
        self._steps.post(lambda engine: engine.release_reservation(place.reservation, quarantine=True))

    def free(self, place: Place) -> None:
        """`BlockReserver`."""
        self._give_slots(place)
        self._steps.post(lambda engine: engine.free_quarantined(place.reservation), lambda _: self._on_blocks_freed())

    def _place(self, reservation: Reservation) -> Place | None:
        """None: no slots now."""
        if self._staged is None:
            return Place(reservation, reservation.blocks)
        slots = self._staged.take(len(reservation.blocks))
        return None if slots is None else Place(reservation, slots)

    def _give_slots(self, place: Place) -> None:
        if self._staged is not None:
            self._staged.give(place.blocks)
            self._on_blocks_freed()

    def _give_back(self, reservation: Reservation) -> None:
        self._steps.post(
            lambda engine: engine.release_reservation(reservation, quarantine=False), lambda _: self._on_blocks_freed()
        )


def is_probe(reservation: Reservation) -> bool:
    """Whether a reservation is a canary's."""
    return reservation.request_id.startswith(_PROBE_PREFIX)


def _refused(refusal: Refusal, submit: Submit) -> ServingError:
    """The error that tells the writer whether another decode worker may take the request."""
    kind: type[ServingError] = TransferError
    if refusal.code in ("too_long", "invalid"):
        kind = PromptTooLong
    elif refusal.code == "full":
        kind = Overloaded
    return kind(f"{refusal.code}: {refusal.reason}", request_id=submit.request_id)
