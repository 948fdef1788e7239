"""The KV of one sequence on its way from the step thread to its hand-off.

The engine reports finished layers to `Outbox` (step thread). The hand-off is opened on the asyncio thread shortly
before the sequence is computed; should the engine be faster, `Outbound` keeps the reports until it is there.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq

from kv_transfer.writer import Handoff
from llm_engine.api.messages import Submit
from llm_engine.sched import Prefilled, Sequence


class Outbound:
    """One sequence to be handed over. `opened` is its hand-off, once offered.

    `seq` and `digests` (of its full blocks) are set on the step thread when the engine has taken the request.
    """

    def __init__(self, submit: Submit, num_tokens: int, opened: asyncio.Future[Handoff]) -> None:
        self.submit = submit
        self.num_tokens = num_tokens
        self.opened = opened
        self.seq: Sequence | None = None
        self.digests = b""
        self.started = False
        self._lock = threading.Lock()
        self._handoff: Handoff | None = None
        self._early: list[tuple[range, int, Seq[int]]] = []

    def layers_ready(self, layers: range, first_block_index: int, block_ids: Seq[int]) -> None:
        """Blocks that are computed, or will be by what is submitted to the device; on the step thread. Never waits."""
        with self._lock:
            if self._handoff is None:
                self._early.append((layers, first_block_index, block_ids))
                return
        self._handoff.layers_ready(layers, first_block_index, block_ids)

    def complete(self, prefilled: Prefilled) -> None:
        """Everything is computed, on the step thread: the hand-off, if it is offered by now, need not wait for more."""
        with self._lock:
            handoff = self._handoff
        if handoff is not None:
            handoff.complete(prefilled.first, compute_end=prefilled.compute_end)

    def attach(self, handoff: Handoff) -> None:
        """Pass on what has been reported so far, in order, and everything that follows."""
        with self._lock:
            for report in self._early:
                handoff.layers_ready(*report)
            self._early.clear()
            self._handoff = handoff


class Outbox:
    """The engine's `LayerSink`: finds the outbound of a sequence. Reports for others (aborted by now) are dropped."""

    def __init__(self) -> None:
        self._outbound: dict[tuple[str, int], Outbound] = {}
        self.on_started: Callable[[Outbound], None] = lambda outbound: None  # called on the step thread

    def open(self, outbound: Outbound) -> None:
        """Expect reports for this attempt. On the asyncio thread, before the engine knows of it."""
        self._outbound[outbound.submit.request_id, outbound.submit.attempt] = outbound

    def close(self, outbound: Outbound) -> None:
        """Expect no more reports. On the asyncio thread; idempotent."""
        self._outbound.pop((outbound.submit.request_id, outbound.submit.attempt), None)

    def started(self, seq: Sequence) -> None:
        """`LayerSink`."""
        outbound = self._outbound.get((seq.request_id, seq.attempt))
        if outbound is not None:
            self.on_started(outbound)

    def layers_ready(self, seq: Sequence, layers: range, first_block_index: int, block_ids: Seq[int]) -> None:
        """`LayerSink`."""
        outbound = self._outbound.get((seq.request_id, seq.attempt))
        if outbound is not None:
            outbound.layers_ready(layers, first_block_index, block_ids)

    def prefilled(self, prefilled: Prefilled) -> None:
        """A sequence is computed, on the step thread."""
        outbound = self._outbound.get((prefilled.seq.request_id, prefilled.seq.attempt))
        if outbound is not None:
            outbound.complete(prefilled)


class OfferQueue:
    """Decides when a sequence is offered: in the order of arrival, a few steps' worth of tokens ahead of compute.

    Earlier would tie up decode blocks for nothing; later would let the grant arrive after the first layers.
    """

    def __init__(self, lookahead_tokens: int) -> None:
        self._lookahead = lookahead_tokens
        self._waiting: deque[Outbound] = deque()
        self._ahead: dict[Outbound, int] = {}  # offered, not started → tokens

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, outbound: Outbound) -> None:
        """A sequence has arrived."""
        self._waiting.append(outbound)

    def due(self) -> Outbound | None:
        """The next sequence to be offered now; it counts as offered."""
        if not self._waiting:
            return None
        head = self._waiting[0]
        if not head.started and self._ahead and sum(self._ahead.values()) + head.num_tokens > self._lookahead:
            return None
        self._waiting.popleft()
        if not head.started:
            self._ahead[head] = head.num_tokens
        return head

    def defer(self, outbound: Outbound) -> None:
        """It could not be offered after all: it is next again."""
        self._ahead.pop(outbound, None)
        self._waiting.appendleft(outbound)

    def start(self, outbound: Outbound) -> None:
        """The engine is computing it."""
        outbound.started = True
        self._ahead.pop(outbound, None)

    def remove(self, outbound: Outbound) -> None:
        """It is over. Idempotent."""
        self._ahead.pop(outbound, None)
        if outbound in self._waiting:
            self._waiting.remove(outbound)
