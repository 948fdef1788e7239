"""Optimistic accounting: what this router has sent to the workers and their reports do not show yet.

A load report is up to one heartbeat old, and a burst of requests arrives within one. Every attempt therefore books its
tokens, blocks and slot when it is sent and gives them back stage by stage; a worker counts as at least as loaded as
this router's own bookings say.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from llm_engine.api.messages import Load
from router.prefix_map import PrefixMap


class Ledger(msgspec.Struct):
    """Bookings of this router on one worker."""

    waiting_tokens: int = 0  # of attempts that have no first token yet
    pending_blocks: int = 0  # of attempts whose hand-off is not done
    num_seqs: int = 0  # attempts that decode here, or will
    sent_tokens: int = 0  # since the last report
    sent_seqs: int = 0
    started_blocks: int = 0  # of hand-offs done since the last report
    epoch: int = 0  # number of reports

    def reported(self) -> None:
        """A load report arrived: what was sent before is in it, or still in the bookings."""
        self.sent_tokens = 0
        self.sent_seqs = 0
        self.started_blocks = 0
        self.epoch += 1

    def backlog_tokens(self, load: Load) -> int:
        """Tokens that wait for prefill on the worker."""
        return max(load.waiting_tokens + self.sent_tokens, self.waiting_tokens)

    def seqs(self, load: Load) -> int:
        """Sequences that decode on the worker or are on their way."""
        return max(load.num_running + load.pending_handoffs + self.sent_seqs, self.num_seqs)

    def blocks_available(self, load: Load) -> int:
        """Blocks that a new sequence may take; bookings beyond the reported leases are still on their way."""
        unseen = max(0, self.pending_blocks - load.blocks_leased) + self.started_blocks
        return load.blocks_free + load.blocks_cached - unseen

    def idle(self, load: Load) -> bool:
        """Whether nothing that will end holds blocks of the worker."""
        return self.num_seqs == 0 and load.blocks_live + load.blocks_leased + load.blocks_quarantined == 0


class Booking(msgspec.Struct):
    """What one attempt holds on its workers. `prefill` and `decode` are one ledger for an aggregated worker."""

    prefill: Ledger
    decode: Ledger
    prefix: PrefixMap  # of the prefill worker
    tokens: int  # left to prefill after the prefix hit
    blocks: int  # new blocks on the decode worker
    digests: Sequence[bytes]
    _epochs: tuple[int, int] = (0, 0)
    _prefilling: bool = False
    _pending: bool = False
    _open: bool = False

    def open(self) -> None:
        """The attempt was sent."""
        self._prefilling = self._pending = self._open = True
        self._epochs = (self.prefill.epoch, self.decode.epoch)
        self.prefill.waiting_tokens += self.tokens
        self.prefill.sent_tokens += self.tokens
        self.decode.pending_blocks += self.blocks
        self.decode.num_seqs += 1
        self.decode.sent_seqs += 1
        if self.digests:
            self.prefix.expect(self.digests)

    def prefilled(self) -> None:
        """The first token arrived."""
        if self._prefilling:
            self._prefilling = False
            self.prefill.waiting_tokens -= self.tokens
            if self.prefill.epoch == self._epochs[0]:
                self.prefill.sent_tokens -= self.tokens
            if self.digests:
                self.prefix.unexpect(self.digests)

    def started(self) -> None:
        """The decode worker owns the sequence: its blocks are in the worker's next report."""
        self.prefilled()
        if self._pending:
            self._pending = False
            self.decode.pending_blocks -= self.blocks
            self.decode.started_blocks += self.blocks

    def close(self) -> None:
        """The attempt is over, however it ended."""
        self.prefilled()
        if self._pending:
            self._pending = False
            self.decode.pending_blocks -= self.blocks
        if self._open:
            self._open = False
            self.decode.num_seqs -= 1
            if self.decode.epoch == self._epochs[1]:
                self.decode.sent_seqs -= 1
