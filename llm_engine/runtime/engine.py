"""One model on one device: plan → batch → forward → sample → commit. Called from one thread only.

Life of a sequence
  prefill role     add → WAITING → PREFILLING (chunks; the sink hears of finished layers) → token 1 in a delta →
                   `Prefilled` → SENDING → release_sent
  decode role      reserve → (hand-off) → admit → DECODING → finish, or a Failure that hands it back to its router
  aggregated role  add → WAITING → PREFILLING → DECODING → …
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any

from llm_engine.api.config import ClusterConfig
from llm_engine.api.handoff import FirstToken
from llm_engine.api.messages import KvSnapshot, Load, Role, Submit
from llm_engine.sched import LayerSink, Refusal, Reservation, Sequence, StepResult


class Engine:
    """Owns the sequences, the block pool and the prefix cache of one worker; computes them with one model and store.

    `format_id` is the root of the prefix cache's digests. `max_len` is the longest sequence this engine can hold.
    """

    def __init__(
        self,
        config: ClusterConfig,
        model: Any,
        store: Any,
        *,
        role: Role,
        format_id: str,
        on_layer: LayerSink | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_len = 0
        raise NotImplementedError

    # -- prefill and aggregated ---------------------------------------------------------------------------------------

    def add(self, submit: Submit) -> Sequence | Refusal:
        """Queue a request. A newer attempt of a known request aborts the older one; an older one is `stale`."""
        raise NotImplementedError

    def release_sent(self, seq: Sequence) -> None:
        """Unpin the blocks of a sequence that has left a prefill engine: after Accepted, Withdraw, failure or abort.

        On a prefill engine the blocks of every started sequence, however it ended, stay pinned until this call, since a
        sender may still read them. Idempotent; a no-op for a sequence that never started.
        """
        raise NotImplementedError

    # -- decode -------------------------------------------------------------------------------------------------------

    def reserve(self, submit: Submit, num_tokens: int) -> Reservation | Refusal | None:
        """Set blocks aside for the first `num_tokens` tokens of an offered request. None: no room now, ask again later.

        The engine's own prefix hits are pinned and count as received. Refusal: it can never be taken here, or a newer
        attempt is known.
        """
        raise NotImplementedError

    def release_reservation(self, reservation: Reservation, *, quarantine: bool) -> None:
        """Give a reservation up.

        `quarantine`: a writer may still write, so the leased blocks wait for `free_quarantined`.
        """
        raise NotImplementedError

    def free_quarantined(self, reservation: Reservation) -> None:
        """The writer is proven stopped: the quarantined blocks of this reservation may be used again."""
        raise NotImplementedError

    def admit(self, submit: Submit, reservation: Reservation, first: FirstToken) -> Sequence:
        """Take over a handed-off sequence whose blocks are verified. The next step restates token 1 and decodes on.

        Raises ValueError when `first` does not fit the model (hidden state of the wrong size).
        """
        raise NotImplementedError

    # -- any role -----------------------------------------------------------------------------------------------------

    def abort(self, request_id: str, attempt: int) -> Sequence | None:
        """Stop this attempt and every older one. No delta follows. Returns the sequence, None if there was none.

        A reservation is not touched: its lease decides.
        """
        raise NotImplementedError

    def drain(self, *, hand_back: bool = False) -> None:
        """Take no new work.

        `hand_back`: the next step also fails every waiting, prefilling and decoding sequence with `draining`.
        """
        raise NotImplementedError

    def step(self) -> StepResult | None:
        """Advance by one step. None: nothing happened and nothing can be done until the next call from outside."""
        raise NotImplementedError

    def waiting(self) -> Seq[Sequence]:
        """Sequences not yet started, in the order in which they will be (for early offers)."""
        raise NotImplementedError

    @property
    def is_idle(self) -> bool:
        """No sequence, pinned block, reservation or quarantined block is left."""
        raise NotImplementedError

    @property
    def draining(self) -> bool:
        raise NotImplementedError

    def load(self) -> Load:
        """Counts for the router. `seq`, the step clocks, `pending_handoffs` and the health fields are the worker's."""
        raise NotImplementedError

    def kv_snapshot(self) -> KvSnapshot:
        """The whole prefix index as of the last event handed out in a StepResult."""
        raise NotImplementedError

    def check(self) -> None:
        """Verify every invariant of the block pool, prefix index and schedulers. Raises AssertionError."""
        raise NotImplementedError
