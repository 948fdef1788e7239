"""Block pool and prefix index together, in terms of what a sequence holds, finds, grows by and gives back."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq

from llm_engine.api.hashing import chain_digests, root_digest
from llm_engine.sched.block_pool import BlockPool
from llm_engine.sched.prefix_index import PrefixIndex
from llm_engine.sched.sequence import Reservation, Sequence


class PagedCache:
    """The paged caches of one engine. `format_id` keeps digests of different models and layouts apart.

    `with_mtp`: blocks also hold rows of the MTP layer, which come later than those of the main layers.

    Who is given a block may write it at once, by other ways than the engine's passes, so blocks that a pass under way
    may write are given to nobody: `hold` keeps those of its sequences taken until `settle`, whatever ends meanwhile.
    """

    def __init__(
        self,
        num_blocks: int,
        block_tokens: int,
        *,
        format_id: str,
        prefix_cache: bool = True,
        with_mtp: bool = False,
    ) -> None:
        self.block_tokens = block_tokens
        self.index = PrefixIndex()
        self.pool = BlockPool(num_blocks, self.index.evict)
        self._format_id = format_id
        self._prefix_cache = prefix_cache
        self._with_mtp = with_mtp
        self._under_way: frozenset[Sequence] = frozenset()
        self._given_up: list[list[int]] = []  # blocks of theirs that were freed meanwhile

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_tokens)

    def digests(self, tokens: Seq[int], salt: str) -> list[bytes]:
        """Chain digests of the full blocks of `tokens`; none when the prefix cache is off."""
        return chain_digests(tokens, self.block_tokens, self._root(salt)) if self._prefix_cache else []

    def digests_of(self, seq: Sequence) -> list[bytes]:
        """The same of a sequence, worked out once."""
        if not seq.digests:
            seq.digests = self.digests(seq.tokens, seq.submit.salt)
        return seq.digests

    def begin(self, seq: Sequence, headroom: int) -> bool:
        """Give a waiting sequence blocks for all its tokens, starting with those of its longest known prefix.

        At least one token is left to compute, since its output is needed. False when that would leave fewer than
        `headroom` blocks; nothing has changed then.
        """
        hits = self.index.find(self.digests_of(seq)[: (len(seq.tokens) - 1) // self.block_tokens])
        self.pool.share(hits)
        rest = self.blocks_for(len(seq.tokens)) - len(hits)
        fresh = (
            self.pool.take(rest, hits[-1] + 1 if hits else -1) if self.pool.num_available >= rest + headroom else None
        )
        if fresh is None:
            self.pool.release(hits)
            return False
        seq.blocks = hits + fresh
        seq.num_published = len(hits)
        seq.num_cached = seq.num_computed = seq.num_drafted = len(hits) * self.block_tokens
        return True

    def grow(self, seq: Sequence, num_tokens: int) -> bool:
        """Make room for `num_tokens` tokens in all. False when the pool is exhausted."""
        missing = self.blocks_for(num_tokens) - len(seq.blocks)
        if missing <= 0:
            return True
        fresh = self.pool.take(missing, seq.blocks[-1] + 1)
        if fresh is None:
            return False
        seq.blocks += fresh
        return True

    def publish(self, seq: Sequence) -> None:
        """Enter the blocks that have become full, in every cache group, into the prefix index.

        The last MTP row of a block may still be missing: it depends on the token after the block.
        """
        num_final = min(seq.num_computed, seq.num_drafted + 1) if self._with_mtp else seq.num_computed
        num_full = num_final // self.block_tokens
        if not self._prefix_cache or num_full <= seq.num_published:
            return
        for i in range(seq.num_published, num_full):
            if i == len(seq.digests):
                parent = seq.digests[-1] if seq.digests else self._root(seq.submit.salt)
                tokens = seq.tokens[i * self.block_tokens : (i + 1) * self.block_tokens]
                seq.digests += chain_digests(tokens, self.block_tokens, parent)
            if self.index.insert(seq.digests[i], seq.blocks[i]):
                self.pool.mark_indexed(seq.blocks[i])
        seq.num_published = num_full

    def free(self, seq: Sequence) -> None:
        """Give back everything the sequence holds. Its published blocks stay findable until they are evicted."""
        if seq in self._under_way:
            self._given_up.append(seq.blocks)
        else:
            self.pool.release(seq.blocks)
        seq.blocks = []
        seq.num_published = 0

    def hold(self, seqs: Iterable[Sequence]) -> None:
        """A pass that writes blocks of these sequences is about to be launched."""
        assert not self._under_way, "one pass at a time is under way"
        self._under_way = frozenset(seqs)

    def settle(self) -> None:
        """The pass has ended: what was freed of its sequences can be given to others."""
        self._under_way = frozenset()
        for blocks in self._given_up:
            self.pool.release(blocks)
        self._given_up = []

    def distrust(self, seq: Sequence) -> None:
        """Nobody may find the sequence's blocks any more: their content is in doubt."""
        for block in self.index.blocks().intersection(seq.blocks):
            self.index.evict(block)
            self.pool.unmark_indexed(block)

    def reserve(self, num_tokens: int, digests: Seq[bytes], headroom: int) -> tuple[list[int], list[int]] | None:
        """Pin the known prefix of `num_tokens` tokens and lease blocks for the rest: (hits, leased). None: no room.

        `digests` are those of the tokens' full blocks; here everything may be found.
        """
        hits = self.index.find(digests)
        self.pool.share(hits)
        rest = self.blocks_for(num_tokens) - len(hits)
        leased = self.pool.lease(rest) if self.pool.num_available >= rest + headroom else None
        if leased is None:
            self.pool.release(hits)
            return None
        return hits, leased

    def adopt(self, seq: Sequence, reservation: Reservation) -> None:
        """Turn a reservation, whose blocks now hold all its tokens, into the blocks of `seq`."""
        self.pool.admit(reservation.blocks)
        seq.blocks = reservation.hits + reservation.blocks
        self.digests_of(seq)
        seq.num_published = len(reservation.hits)
        seq.num_computed = reservation.num_tokens
        seq.num_drafted = reservation.num_tokens - 1
        self.publish(seq)

    def check(self) -> None:
        """Verify every invariant. Raises AssertionError."""
        self.pool.check()
        self.index.check()
        assert self.index.blocks() == self.pool.indexed_blocks()

    def _root(self, salt: str) -> bytes:
        return root_digest(self._format_id, salt)
