"""What the fake workers compute: tokens that anybody can predict, and a cache of block digests with events."""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Sequence

from llm_engine.api.hashing import chain_digests, root_digest
from llm_engine.api.messages import KvEvents, KvSnapshot, Submit
from llm_engine.api.request import FinishReason, TokenLogprobs, pack_tokens, unpack_tokens

VOCAB = 256  # ids that every checkpoint has
_STRIDE = 2654435761


class FakeSampler:
    """Output token i of a prompt under a seed; the same on every worker and in every attempt."""

    def __init__(self, prompt: bytes, seed: int) -> None:
        self._base = zlib.crc32(prompt, seed & 0xFFFFFFFF)

    def token(self, index: int) -> int:
        return (((self._base + index) * _STRIDE) & 0xFFFFFFFF) * VOCAB >> 32

    def tokens(self, start: int, end: int) -> list[int]:
        base = self._base
        return [(((base + index) * _STRIDE) & 0xFFFFFFFF) * VOCAB >> 32 for index in range(start, end)]


def expected_tokens(prompt: Sequence[int], seed: int, count: int) -> list[int]:
    """The first `count` output tokens that a client must get."""
    return FakeSampler(pack_tokens(prompt), seed).tokens(0, count)


def logprobs_of(tokens: Sequence[int]) -> list[TokenLogprobs]:
    """Log probabilities that can be predicted as well."""
    return [TokenLogprobs(-1.0 - token / VOCAB, [token, 0], [-1.0 - token / VOCAB, -9.0]) for token in tokens]


class FakeSequence:
    """One attempt on a worker."""

    def __init__(self, submit: Submit, block_tokens: int) -> None:
        self.submit = submit
        prompt = submit.tokens[: 4 * submit.num_prompt]
        self.sampler = FakeSampler(prompt, submit.sampling.seed)
        emitted = unpack_tokens(submit.tokens[4 * submit.num_prompt :])
        self.num_output = self.first_index = len(emitted)
        self.resumes_truly = emitted == self.sampler.tokens(0, len(emitted))
        self.num_tokens = submit.num_prompt + len(emitted)
        self.num_blocks = -(-(self.num_tokens + 1) // block_tokens)
        self.cached_tokens = 0
        self.events: KvEvents | None = None  # about its prompt
        self.received = 0.0
        self.started = 0.0
        self.deadline = 0.0  # of the hand-off
        self.granted = False
        self.computed = False

    @property
    def num_left(self) -> int:
        """Tokens to prefill."""
        return self.num_tokens - self.cached_tokens

    def draw(self, count: int) -> tuple[list[int], FinishReason | None]:
        """The next tokens, up to `count`, and the finish if they end the sequence."""
        sampling = self.submit.sampling
        end = min(self.num_output + count, sampling.max_tokens)
        tokens = self.sampler.tokens(self.num_output, end)
        if sampling.stop_token_ids:
            for offset, token in enumerate(tokens):
                if token in sampling.stop_token_ids and self.num_output + offset >= sampling.min_tokens:
                    self.num_output += offset + 1
                    return tokens[: offset + 1], FinishReason.STOP
        self.num_output = end
        return tokens, FinishReason.LENGTH if end >= sampling.max_tokens else None


class FakePrefixCache:
    """The digests a worker holds, oldest first, and the events about them."""

    def __init__(self, format_id: str, block_tokens: int, capacity: int) -> None:
        self._format_id = format_id
        self._block_tokens = block_tokens
        self._capacity = capacity
        self._digests: OrderedDict[bytes, None] = OrderedDict()
        self.seq = 0

    def __len__(self) -> int:
        return len(self._digests)

    def chain(self, submit: Submit) -> list[bytes]:
        return chain_digests(
            unpack_tokens(submit.tokens), self._block_tokens, root_digest(self._format_id, submit.salt)
        )

    def hit_tokens(self, chain: Sequence[bytes]) -> int:
        """Tokens of the leading blocks that are here."""
        count = 0
        while count < len(chain) and chain[count] in self._digests:
            count += 1
        return count * self._block_tokens

    def store(self, chain: Sequence[bytes]) -> KvEvents | None:
        """Keep a chain, evict the oldest; None if nothing changed."""
        stored = [digest for digest in chain if digest not in self._digests]
        for digest in reversed(chain):  # heads are younger than their tails
            self._digests[digest] = None
            self._digests.move_to_end(digest)
        removed = []
        while len(self._digests) > self._capacity:
            removed.append(self._digests.popitem(last=False)[0])
        if not stored and not removed:
            return None
        self.seq += 1
        return KvEvents(seq=self.seq, stored=[d for d in stored if d in self._digests], removed=removed)

    def snapshot(self) -> KvSnapshot:
        return KvSnapshot(seq=self.seq, digests=list(self._digests))
