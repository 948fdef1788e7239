from __future__ import annotations

import asyncio

from llm_engine.api.hashing import chain_digests, root_digest
from router.flight import HASH_AT_ONCE_TOKENS, PrefixChain


async def test_a_long_prompt_is_hashed_in_pieces() -> None:
    loop = asyncio.get_running_loop()
    turns = 0

    def count() -> None:
        nonlocal turns
        turns += 1
        loop.call_soon(count)

    tokens = list(range(4 * HASH_AT_ONCE_TOKENS + 77))
    chain = PrefixChain("salt")
    loop.call_soon(count)
    await chain.fill(tokens, "format", 16)
    assert turns >= 4, "nothing else had its turn"
    assert chain.digests(tokens, "format", 16) == chain_digests(tokens, 16, root_digest("format", "salt"))


async def test_digests_follow_the_format_that_is_asked_for() -> None:
    tokens = list(range(2 * HASH_AT_ONCE_TOKENS))
    chain = PrefixChain("")
    await chain.fill(tokens, "old", 16)
    assert chain.digests(tokens, "new", 64) == chain_digests(tokens, 64, root_digest("new"))
