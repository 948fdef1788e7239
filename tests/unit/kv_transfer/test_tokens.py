"""The tokens of an offer follow its grant: admitted is what was offered, whole, or nothing."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from llm_engine.api.handoff import Accepted, Offer, Refused, Rejected
from llm_engine.api.hashing import DIGEST_BYTES
from llm_engine.api.messages import Submit
from llm_engine.api.request import pack_tokens
from tests.unit.kv_transfer.raw_writer import RawWriter, raw_writers
from tests.unit.kv_transfer.rig import Rig, make_submit, until

TOKENS = pack_tokens(range(20))


async def admitted(writer: RawWriter, **tokens: Any) -> bool:
    """An honest hand-off but for its tokens; whether it was admitted. Nothing is lost if it was not."""
    grant = await writer.granted("r1", 20, tokens=False)
    if tokens:
        writer.say(writer.tokens(grant, **{"tokens": TOKENS, **tokens}))
    writer.say(writer.commit(grant, writer.send_blocks(grant)))
    answer = await writer.hear()
    if isinstance(answer, Accepted):
        return True
    assert isinstance(answer, Rejected)
    assert "20 tokens are not here" in answer.reason
    assert writer.rig.pool.admitted == writer.rig.pool.prepared == {}
    assert len(writer.rig.pool.free_blocks) == 32
    return False


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_the_sequence_is_admitted_with_the_tokens_of_its_lease(transport: str) -> None:
    async with Rig("auto") as rig, raw_writers(rig, transport=transport) as [writer]:
        assert await admitted(writer, tokens=TOKENS)


@pytest.mark.parametrize(
    "tokens",
    [{}, {"tokens": TOKENS[:-4]}, {"tokens": TOKENS + b"\0"}, {"epoch": 99}, {"lease_id": 1}, {"attempt": 1}],
    ids=["none", "fewer", "more", "epoch", "lease", "attempt"],
)
@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_without_them_nothing_is_admitted(transport: str, tokens: dict[str, Any]) -> None:
    async with Rig("auto") as rig, raw_writers(rig, transport=transport) as [writer]:
        assert not await admitted(writer, **tokens)


async def test_others_can_not_send_them_and_the_first_count() -> None:
    async with Rig("auto") as rig, raw_writers(rig, 2) as [owner, other]:
        asked: list[Submit] = []
        rig.pool.refuse = asked.append
        grant = await owner.granted("r1", 20, tokens=False)
        other.say(other.tokens(grant, TOKENS[::-1]))
        await other.granted("r2", 20)  # so what it said before has been read
        assert "r1" not in rig.pool.prepared
        owner.say(owner.tokens(grant, TOKENS))
        owner.say(owner.tokens(grant, TOKENS[::-1]))
        owner.say(owner.commit(grant, owner.send_blocks(grant)))
        assert isinstance(await owner.hear(), Accepted)
        assert asked[-1].tokens == TOKENS


async def test_a_writer_that_may_still_write_keeps_its_blocks() -> None:
    """The first token came, the tokens did not: only the manifest says that nothing is written any more."""
    async with Rig("auto") as rig, raw_writers(rig, transport="shm") as [writer]:
        grant = await writer.granted("r1", 20, tokens=False)
        writer.say(writer.commit(grant, None))
        active = rig.intakes._active
        await until(lambda: active["r1"].last is not None)
        assert rig.pool.count("leased") == 5
        writer.say(writer.commit(grant, writer.send_blocks(grant), first=None))
        assert isinstance(await writer.hear(), Rejected)
        assert len(rig.pool.free_blocks) == 32


@pytest.mark.parametrize(
    "changes", [{"digests": bytes(DIGEST_BYTES)}, {"digests": bytes(5 * DIGEST_BYTES + 1)}, {"tokens": TOKENS}]
)
async def test_an_offer_holds_the_digests_of_every_block_or_none_and_no_tokens(changes: dict[str, bytes]) -> None:
    async with Rig("auto") as rig, raw_writers(rig) as [writer]:
        submit = msgspec.structs.replace(make_submit("r1", 20, rig.target), tokens=changes.get("tokens", b""))
        digests = changes.get("digests", bytes(5 * DIGEST_BYTES))
        writer.say(Offer(submit=submit, num_tokens=20, weight_version="w1", digests=digests))
        answer = await writer.hear()
        assert isinstance(answer, Refused)
        assert "for 20 tokens" in answer.reason
        assert rig.server.stats().pending == 0
