"""The life of every request in this router: queue, attempts, recoveries, end.

`open` queues a request → `pump` finds a credit and a pair and sends an attempt → the inbox applies what the workers say
→ `finish`, `fail` or `abort`. Whatever ends an attempt early goes through `recover`: both workers are told to cancel,
and the request waits in front of everybody else for its next attempt, which starts from prompt ‖ emitted tokens.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping

from llm_engine.api.errors import Overloaded, PromptTooLong, RequestError, ServingError, WorkerLost
from llm_engine.api.request import FinishReason
from router.admission import Admission
from router.dispatch_api import GenerationRequest
from router.flight import Flight, Phase, PrefixChain, deadline_error
from router.metrics import RouterMetrics
from router.placement import Placement, Placer
from router.policy import Shortage
from router.report import TimelineLog

logger = logging.getLogger(__name__)

BACKOFF_S = 0.01  # doubled per attempt without progress
MAX_BACKOFF_S = 1.0


class Lifecycle:
    """Owns the flights. Every transition of a `Phase` happens here. Used on the event loop only."""

    def __init__(
        self,
        placer: Placer,
        admission: Admission[Flight],
        metrics: RouterMetrics,
        *,
        eos_ids: frozenset[int],
        max_attempts: int,
        stall_timeout_s: float,
        clock: Callable[[], float],
    ) -> None:
        self.flights: dict[str, Flight] = {}  # what is not over
        self.timelines = TimelineLog()
        self.num_recovering = 0
        self._placer = placer
        self._admission = admission
        self._metrics = metrics
        self._eos_ids = eos_ids
        self._max_attempts = max_attempts
        self._stall_timeout_s = stall_timeout_s
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._recovering: deque[Flight] = deque()
        self._pumping = False
        self._closing = False

    # StreamOwner

    async def hash_ahead(self, request: GenerationRequest) -> PrefixChain:
        """The block digests of a long prompt as the workers that are up now need them."""
        chain = PrefixChain(request.salt)
        cache = self._placer.cache_in_use()
        if cache is not None:
            await chain.fill(request.prompt_tokens, *cache)
        return chain

    def open(self, request: GenerationRequest, chain: PrefixChain | None = None) -> Flight:
        """Queue a request, and send it if there is a place. Raises Overloaded, DeadlineExceeded or RequestError."""
        now = self._clock()
        flight = Flight(request, chain)
        if self._closing:
            self._metrics.refusal("closing")
            raise Overloaded("the router is shutting down", request_id=request.request_id)
        if request.request_id in self.flights:
            raise RequestError(f"request id {request.request_id!r} is in use", request_id=request.request_id)
        if now >= flight.deadline:
            self._metrics.refusal("deadline")
            raise deadline_error(flight)
        try:
            self._admission.enqueue(flight, now)
        except Overloaded as exc:
            self._metrics.refusal("queue_full" if exc.status == 429 else "no_capacity")
            raise
        self.flights[flight.request_id] = flight
        self.pump()
        return flight

    def abort(self, flight: Flight) -> None:
        """The client does not want the rest. Idempotent."""
        if not flight.over:
            self._end(flight, "cancelled")

    def first_chunk_written(self, flight: Flight) -> None:
        """The client has the first token: its time to first token is known.

        Of an answer that is sent as a whole the first token counts when the router has it.
        """
        if flight.first_s is None:
            return
        written = flight.arrived + flight.first_s if flight.whole else self._clock()
        for served in flight.journal.attempts:
            if served.first_token_s is not None:
                flight.stages.update(flight.ttft_stages(written, served))
                self._metrics.first_token(flight.stages)
                return

    # attempts

    def pump(self) -> None:
        """Place whoever can be placed: recoveries first, then the queue in order; nobody overtakes."""
        if self._pumping or self._closing:
            return
        self._pumping = True
        try:
            while self._recovering:
                flight = self._recovering[0]
                if flight.phase is Phase.RECOVERING and not self._place(flight):
                    return
                self._recovering.popleft()
            while (head := self._admission.head()) is not None and self._place(head):
                continue
        finally:
            self._pumping = False

    def recover(self, flight: Flight, cause: str, *, backoff: bool = False) -> None:
        """Give the attempt up and queue the next one, unless the emitted tokens are the end anyway.

        `router.max_attempts` bounds the attempts since the last new token. `backoff`: do not try again at once.
        """
        self._leave_workers(flight, cause)
        flight.phase = Phase.RECOVERING
        self.num_recovering += 1
        journal = flight.journal
        journal.finish = journal.finish_here(self._eos_ids)
        if journal.finish is not None:
            self.finish(flight)
            return
        flight.strikes += 1
        if flight.strikes >= self._max_attempts:
            text = f"given up after {flight.strikes} attempts without progress; the last one: {cause}"
            self.fail(flight, WorkerLost(text, request_id=flight.request_id))
            return
        self._metrics.recovery(cause)
        flight.tokens = journal.tokens()
        if backoff:
            delay_s = min(MAX_BACKOFF_S, BACKOFF_S * 2**flight.strikes)
            self._loop.call_later(delay_s, self._requeue, flight)
        else:
            self._requeue(flight)

    def _requeue(self, flight: Flight) -> None:
        if flight.phase is Phase.RECOVERING:
            self._recovering.append(flight)
            self.pump()

    def _place(self, flight: Flight) -> bool:
        """Find a pair and send the next attempt, or fail the request for good. False: there is no place now."""
        place = self._placer.place(flight)
        if isinstance(place, Placement):
            if flight.phase is Phase.QUEUED:
                self._admission.take()
            else:
                self.num_recovering -= 1
            self._start(flight, place)
            return True
        longest = self._placer.longest_sequence() or 0
        total = flight.journal.num_prompt + flight.journal.sampling.max_tokens
        if place is Shortage.TOO_LONG and total > longest:  # otherwise a lost worker can hold it
            text = f"prompt and output may take {total} tokens, the largest worker holds {longest}"
            self.fail(flight, PromptTooLong(text, request_id=flight.request_id))
            return True
        return False

    def _start(self, flight: Flight, place: Placement) -> None:
        """The attempt was sent: note where it runs."""
        now = self._clock()
        flight.phase = Phase.RUNNING
        flight.prefill, flight.decode, flight.started = place.prefill, place.decode, False
        flight.booking, flight.first_of_attempt = place.booking, True
        flight.journal.begin(place.prefill.name, place.decode.name, now - flight.arrived, place.hit_tokens)
        place.prefill.attempts[flight.request_id] = flight.journal.attempt
        place.decode.attempts[flight.request_id] = flight.journal.attempt
        flight.progress = now
        flight.patience_s = self._stall_timeout_s + 4 * place.ttft_s

    def _leave_workers(self, flight: Flight, outcome: str) -> None:
        """End the attempt on both sides; nothing of it counts from now on."""
        if flight.phase is not Phase.RUNNING:
            return
        flight.journal.end(outcome, self._clock() - flight.arrived)
        if flight.booking is not None:
            flight.booking.close()
            flight.booking = None
        for worker in (flight.prefill, flight.decode if flight.decode is not flight.prefill else None):
            if worker is None:
                continue
            if outcome == "finished":
                worker.attempts.pop(flight.request_id, None)
            else:
                worker.cancel(flight.request_id, flight.journal.attempt)
        flight.prefill = flight.decode = None

    # ends

    def finish(self, flight: Flight) -> None:
        """The journal has a finish: the sequence is complete, or its worker says that nobody waits for it any more."""
        finish = flight.journal.finish
        if finish is FinishReason.DEADLINE:
            self.fail(flight, deadline_error(flight))
        elif finish is FinishReason.CANCELLED:
            self.fail(flight, WorkerLost("cancelled by its worker", request_id=flight.request_id))
        else:
            self._end(flight, "finished")

    def fail(self, flight: Flight, error: ServingError) -> None:
        """End with an error, after the tokens that the client has not read yet."""
        flight.error = error
        self._end(flight, "error")

    def close(self) -> None:
        """Fail what is left and refuse what comes."""
        self._closing = True
        for flight in list(self.flights.values()):
            self.fail(flight, Overloaded("the router is shutting down", request_id=flight.request_id))

    def _end(self, flight: Flight, outcome: str) -> None:
        """The request is over: give back what it holds, once."""
        now = self._clock()
        self._leave_workers(flight, outcome)
        if flight.phase is Phase.QUEUED:
            self._admission.left()
        else:
            self._admission.release(now)
            self.num_recovering -= flight.phase is Phase.RECOVERING
        flight.phase, flight.over = Phase.OVER, True
        flight.ended_s = now - flight.arrived
        del self.flights[flight.request_id]
        finish, steps = flight.journal.finish, len(flight.journal.output) - 1
        label = finish if outcome == "finished" and finish is not None else outcome
        tpot_s = (flight.ended_s - flight.first_s) / steps if flight.first_s is not None and steps > 0 else None
        self._metrics.finished(label, flight.ended_s, tpot_s)
        self.timelines.add(flight)
        flight.wake()
        self.pump()

    # clocks

    def tick(self, now: float) -> None:
        """End what has passed its deadline or waited too long for a place; recover what has fallen silent."""
        for flight in [f for f in self.flights.values() if now >= f.deadline]:
            self.fail(flight, deadline_error(flight))
        for flight in list(self._silent(now)):
            logger.warning("%s: attempt %d is silent", flight.request_id, flight.journal.attempt)
            flight.avoid |= {worker.name for worker in (flight.prefill, flight.decode) if worker is not None}
            self.recover(flight, "stalled")
        for flight in list(self._admission.expired(now)):
            self._metrics.refusal("queue_timeout")
            wait_s = self._admission.retry_after_s(now)
            text = f"no place within {now - flight.enqueued:.1f} s (router.queue_timeout_s)"
            self.fail(flight, Overloaded(text, retry_after_s=wait_s, request_id=flight.request_id))
        self.pump()

    def _silent(self, now: float) -> Iterator[Flight]:
        return (f for f in self.flights.values() if f.phase is Phase.RUNNING and now - f.progress > f.patience_s)

    def counts(self) -> Mapping[str, int]:
        """Requests by what they wait for."""
        return {
            "inflight": self._admission.num_inflight,
            "queued": self._admission.num_queued,
            "recovering": self.num_recovering,
        }
