"""Applies what workers say about attempts. `Deltas` is the hot path: one message a worker step, all streams in it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from llm_engine.api.errors import DeadlineExceeded, PromptTooLong, RequestError, ServingError
from llm_engine.api.messages import Failed, Started
from llm_engine.api.request import TokenDelta
from router.flight import Flight, Phase
from router.journal import Applied
from router.lifecycle import Lifecycle
from router.metrics import RouterMetrics
from router.worker import Worker, WorkMessage

logger = logging.getLogger(__name__)

_ERRORS: Mapping[str, type[ServingError]] = {
    "too_long": PromptTooLong,
    "invalid": RequestError,
    "deadline": DeadlineExceeded,
}
_CODES = frozenset(
    {"full", "handoff", "preempted", "draining", "deadline", "too_long", "stale", "invalid", "router", "internal"}
)


class Inbox:
    """Moves flights along as their workers report."""

    def __init__(
        self, lifecycle: Lifecycle, metrics: RouterMetrics, *, stall_timeout_s: float, clock: Callable[[], float]
    ) -> None:
        self._lifecycle = lifecycle
        self._flights = lifecycle.flights
        self._metrics = metrics
        self._stall_timeout_s = stall_timeout_s
        self._clock = clock

    def accept(self, worker: Worker, message: WorkMessage) -> None:
        """Handle one message."""
        if isinstance(message, Failed):
            flight = self._running(message.request_id, message.attempt)
            if flight is not None:
                self._failed(flight, worker, message)
            return
        for started in message.started:
            flight = self._running(started.request_id, started.attempt)
            if flight is not None:
                self._started(flight, worker, started)
        self._deltas(message.items)

    def lost(self, worker: Worker, attempts: Mapping[str, int], cause: str) -> None:
        """Recover what the loss of a worker interrupts. What decode took over is no attempt of prefill any more."""
        for request_id, attempt in attempts.items():
            flight = self._running(request_id, attempt)
            if flight is not None:
                self._lifecycle.recover(flight, f"{'decode' if worker is flight.decode else 'prefill'}_{cause}")

    def _running(self, request_id: str, attempt: int) -> Flight | None:
        """None: the attempt was given up."""
        flight = self._flights.get(request_id)
        if flight is None or flight.phase is not Phase.RUNNING or flight.journal.attempt != attempt:
            return None
        return flight

    def _deltas(self, items: list[TokenDelta]) -> None:
        now = self._clock()
        flights, metrics, num_new = self._flights, self._metrics, 0
        for delta in items:
            flight = flights.get(delta.request_id)
            if flight is None:
                continue
            journal = flight.journal
            have = len(journal.output)
            applied = journal.apply(delta)
            if applied is Applied.NOTHING:
                continue
            if applied is Applied.BROKEN:
                logger.error("%s: attempt %d sent impossible tokens", delta.request_id, delta.attempt)
                self._lifecycle.recover(flight, "broken_stream")
                continue
            num_new += len(journal.output) - have
            flight.progress = now
            if flight.first_of_attempt:
                self._first_token(flight, delta, now)
            else:
                metrics.gap(now - flight.last_output)
            flight.last_output = now
            if journal.finish is not None:
                self._lifecycle.finish(flight)
            else:
                flight.wake()
        metrics.output_tokens(num_new)

    def _first_token(self, flight: Flight, delta: TokenDelta, now: float) -> None:
        """The first new token of an attempt: prefill is done."""
        journal, since = flight.journal, now - flight.arrived
        flight.first_of_attempt = False
        record = journal.record
        record.first_token_s, record.times = since, delta.times
        if flight.booking is not None:
            flight.booking.prefilled()
        flight.strikes, flight.avoid = 0, frozenset()
        flight.patience_s = self._stall_timeout_s
        if flight.first_s is not None:
            self._metrics.gap(now - flight.last_output)
            return
        flight.first_s = since
        journal.cached_tokens = delta.cached_tokens or 0
        self._metrics.prompt(journal.num_prompt, journal.cached_tokens)

    def _started(self, flight: Flight, worker: Worker, message: Started) -> None:
        """Decode owns the sequence."""
        if flight.started or worker is not flight.decode or flight.prefill is None:
            return
        flight.started = True
        flight.progress = self._clock()
        record = flight.journal.record
        record.started_s = flight.progress - flight.arrived
        record.handoff_s, record.exposed_s = message.handoff_s, message.exposed_s
        record.handoff_bytes = message.num_bytes
        if flight.booking is not None:
            flight.booking.started()
        if flight.prefill is not flight.decode:
            flight.prefill.attempts.pop(flight.request_id, None)
            self._metrics.handed_off(message.handoff_s, message.exposed_s, message.num_bytes)

    def _failed(self, flight: Flight, worker: Worker, message: Failed) -> None:
        """A worker gives its attempt back, or says that no attempt can help."""
        if flight.started and worker is not flight.decode:
            return  # prefill did not hear that decode has taken over
        code = message.code if message.code in _CODES else "other"
        logger.info(
            "%s: attempt %d: %s: %s: %s", message.request_id, message.attempt, worker.name, code, message.reason
        )
        if not message.retryable:
            kind = _ERRORS.get(code, ServingError)
            self._lifecycle.fail(flight, kind(f"{worker.name}: {message.reason}", request_id=flight.request_id))
            return
        if flight.first_of_attempt:
            partner = flight.decode if code == "handoff" else worker
            flight.avoid |= {item.name for item in (worker, partner) if item is not None}
        self._lifecycle.recover(flight, code, backoff=flight.first_of_attempt)
