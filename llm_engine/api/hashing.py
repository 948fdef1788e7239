"""Chained digests of token blocks: the key of every prefix cache and of prefix-aware routing."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from llm_engine.api.request import pack_tokens

DIGEST_BYTES = 16


def root_digest(format_id: str, salt: str = "") -> bytes:
    """Start of a chain: caches of other formats or other tenants (`salt`) never share an entry."""
    return hashlib.blake2b(f"{format_id}\x00{salt}".encode(), digest_size=DIGEST_BYTES).digest()


def split_digests(data: bytes) -> list[bytes]:
    """Digests that were sent one after another."""
    return [data[start : start + DIGEST_BYTES] for start in range(0, len(data), DIGEST_BYTES)]


def chain_digests(tokens: Sequence[int], block_tokens: int, root: bytes) -> list[bytes]:
    """One digest per *full* block; digest j covers tokens [0, (j+1)·block_tokens)."""
    data = pack_tokens(tokens)
    stride = block_tokens * 4
    digests: list[bytes] = []
    parent = root
    for start in range(0, len(tokens) // block_tokens * stride, stride):
        parent = hashlib.blake2b(parent + data[start : start + stride], digest_size=DIGEST_BYTES).digest()
        digests.append(parent)
    return digests
