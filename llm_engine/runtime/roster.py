"""Every sequence of an engine and what it holds: one place where sequences end, however they end."""

from __future__ import annotations

from collections.abc import Iterator

from llm_engine.api.request import FinishReason
from llm_engine.runtime.outbox import Outbox
from llm_engine.runtime.runner import Runner
from llm_engine.runtime.speculate import Speculator
from llm_engine.sched.decode import DecodeScheduler
from llm_engine.sched.paged_cache import PagedCache
from llm_engine.sched.prefill import PrefillScheduler
from llm_engine.sched.sequence import Phase, Sequence


class Roster:
    """Sequences by request id.

    `pins`: the blocks of a sequence that ends stay taken until `unpin`, since a sender may still read them.
    """

    def __init__(
        self,
        cache: PagedCache,
        prefill: PrefillScheduler,
        decode: DecodeScheduler,
        runner: Runner,
        speculator: Speculator | None,
        outbox: Outbox,
        *,
        pins: bool,
    ) -> None:
        self._cache = cache
        self._prefill = prefill
        self._decode = decode
        self._runner = runner
        self._speculator = speculator
        self._outbox = outbox
        self._pins = pins
        self._by_request: dict[str, Sequence] = {}
        self._pinned: set[Sequence] = set()
        self._next_deadline = float("inf")

    def __len__(self) -> int:
        return len(self._by_request)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(list(self._by_request.values()))

    @property
    def num_pinned(self) -> int:
        """Sequences that are over but for their blocks."""
        return len(self._pinned)

    def get(self, request_id: str) -> Sequence | None:
        return self._by_request.get(request_id)

    def newest_attempt(self, request_id: str) -> int:
        """Of the sequence that is here; -1: there is none."""
        seq = self._by_request.get(request_id)
        return -1 if seq is None else seq.attempt

    def supersede(self, request_id: str) -> None:
        """End the older attempt of a request that comes anew."""
        seq = self._by_request.get(request_id)
        if seq is not None:
            self.fail(seq, "stale", "a newer attempt has arrived", retryable=False)

    def enter(self, seq: Sequence) -> None:
        assert seq.request_id not in self._by_request
        self._by_request[seq.request_id] = seq
        self._next_deadline = min(self._next_deadline, seq.deadline)

    def finish(self, seq: Sequence, reason: FinishReason, now: float) -> None:
        """The sequence has its last token."""
        self._outbox.finished(seq, reason, now)
        self.drop(seq)

    def fail(self, seq: Sequence, code: str, reason: str, *, retryable: bool) -> None:
        """The sequence ends without a finish."""
        self._outbox.failed(seq, code, reason, retryable=retryable)
        self.drop(seq)

    def drop(self, seq: Sequence) -> None:
        """Take back all the sequence holds; nobody is told."""
        del self._by_request[seq.request_id]
        if seq.phase in (Phase.WAITING, Phase.PREFILLING):
            self._prefill.remove(seq)
        elif seq.phase is Phase.DECODING:
            self._decode.remove(seq)
        seq.phase = Phase.ENDED
        self.retire(seq)
        if self._pins and seq.blocks:
            self._pinned.add(seq)
        else:
            self._cache.free(seq)

    def retire(self, seq: Sequence) -> None:
        """The sequence takes part in no further pass (for the time being): forget its state on the device side."""
        self._runner.close(seq)
        if self._speculator is not None:
            self._speculator.forget(seq)

    def unpin(self, seq: Sequence) -> None:
        """Nobody reads the blocks of a sequence any more that has been sent or is over. Idempotent."""
        if seq.phase is Phase.PREFILLED:
            self.drop(seq)
        if seq.phase is not Phase.ENDED:
            raise ValueError(f"{seq.request_id}: {seq.phase.value}, so it can't be released yet: abort it first")
        if seq in self._pinned:
            self._pinned.remove(seq)
            self._cache.free(seq)

    def is_due(self, now: float) -> bool:
        """Whether `expire` may have something to do."""
        return now >= self._next_deadline

    def expire(self, now: float) -> None:
        """Finish every sequence whose deadline has passed. One that is being sent is bounded by its hand-off."""
        if now < self._next_deadline:
            return
        for seq in self:
            if seq.deadline <= now and seq.phase is not Phase.PREFILLED:
                self.finish(seq, FinishReason.DEADLINE, now)
        deadlines = (seq.deadline for seq in self if seq.phase is not Phase.PREFILLED)
        self._next_deadline = min(deadlines, default=float("inf"))
