"""Commit in two parts, the manifest and the first token: in every order, repeated, wrong, and cut off in between."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kv_transfer.writer import Handoff
from llm_engine.api.errors import TransferError
from llm_engine.api.handoff import Accepted, Commit, Fence, Grant, Manifest, Progress, Rejected, Withdraw
from tests.unit.kv_transfer.raw_writer import RawWriter, raw_writers
from tests.unit.kv_transfer.rig import FIRST, Rig, until

MANIFEST, TOKEN = {"first": None}, {"manifest": None}  # what is left out


def changed(manifest: Manifest) -> Manifest:
    """One wrong checksum."""
    plane = manifest.planes[1]
    sums = (plane.checksums[0] ^ 1, *plane.checksums[1:])
    return msgspec.structs.replace(
        manifest, planes=(manifest.planes[0], msgspec.structs.replace(plane, checksums=sums), *manifest.planes[2:])
    )


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("order", [(MANIFEST, TOKEN), (TOKEN, MANIFEST)], ids=["manifest-first", "token-first"])
async def test_both_parts_make_a_commit(transport: str, order: tuple[dict[str, Any], ...]) -> None:
    async with Rig("auto") as rig, raw_writers(rig, transport=transport) as [writer]:
        grant = await writer.granted("r1", 20)
        manifest = writer.send_blocks(grant)
        writer.say(writer.commit(grant, **{"manifest": manifest, **order[0]}))
        writer.say(writer.commit(grant, **{"manifest": manifest, **order[0]}))  # a part counts once
        answer = await writer.hear()
        assert isinstance(answer, Rejected)
        assert not rig.pool.admitted
        writer.say(writer.commit(grant, **{"manifest": manifest, **order[1]}))
        assert isinstance(await writer.hear(), Accepted)
        assert rig.pool.admitted["r1"][1] == FIRST


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_a_wrong_manifest_is_rejected_before_the_prompt_is_computed(transport: str) -> None:
    async with Rig("auto") as rig, raw_writers(rig, transport=transport) as [writer]:
        grant = await writer.granted("r1", 20)
        writer.say(writer.commit(grant, changed(writer.send_blocks(grant)), first=None))
        answer = await writer.hear()
        assert isinstance(answer, Rejected)
        assert "not the bytes that were sent" in answer.reason
        assert len(rig.pool.free_blocks) == 32
        writer.say(writer.commit(grant, None))
        assert isinstance(await writer.hear(), Rejected)
        assert not rig.pool.admitted


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("part", [MANIFEST, TOKEN], ids=["manifest", "token"])
async def test_one_part_is_not_enough_when_the_writer_dies(transport: str, part: dict[str, Any]) -> None:
    async with Rig("auto") as rig, raw_writers(rig, transport=transport) as [writer]:
        grant = await writer.granted("r1", 20)
        manifest = writer.send_blocks(grant)
        writer.say(writer.commit(grant, **{"manifest": manifest, **part}))
        active = rig.intakes._active
        await until(lambda: active["r1"].verified if part is MANIFEST else active["r1"].last is not None)
        writer.link.close()
        await until(lambda: rig.server.stats().pending == 0 and len(rig.pool.free_blocks) == 32)
        assert rig.server.stats().failed == {"writer_lost": 1}
        assert not rig.pool.admitted


async def test_weights_that_change_between_the_parts_reject_the_sequence() -> None:
    async with Rig("auto") as rig, raw_writers(rig) as [writer]:
        grant = await writer.granted("r1", 20)
        writer.say(writer.commit(grant, writer.send_blocks(grant), first=None))
        writer.say(writer.commit(grant, None, weight_version="w0"))
        answer = await writer.hear()
        assert isinstance(answer, Rejected)
        assert "weights w0" in answer.reason
        assert len(rig.pool.free_blocks) == 32


@pytest.mark.parametrize("transport", ["local", "shm", "tcp"])
async def test_the_manifest_travels_while_the_prompt_is_computed(transport: str) -> None:
    """What is left for the end is the first token: the receiver has verified everything."""
    async with Rig(transport) as rig:
        handoff: Handoff = rig.offer("r1", 40)
        rig.compute(handoff)
        await until(lambda: "r1" in rig.intakes._active and rig.intakes._active["r1"].verified)
        assert not rig.pool.admitted
        await handoff.commit(FIRST, compute_end=0.0)
        assert rig.pool.admitted["r1"][1] == FIRST


ACTIONS = (
    "manifest",
    "wrong",
    "token",
    "old_token",
    "both",
    "other_epoch",
    "nothing",
    "progress",
    "cancel",
    "withdraw",
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.sampled_from(ACTIONS), min_size=1, max_size=6))
def test_any_order_of_messages_admits_a_whole_sequence_or_none(actions: list[str]) -> None:
    asyncio.run(_play(actions))


async def _play(actions: list[str]) -> None:
    """Says every action in turn, beside a model of what must come of it."""
    async with Rig("auto") as rig, raw_writers(rig) as [writer]:
        grant = await writer.granted("r1", 20)
        manifest = writer.send_blocks(grant)
        standing, written, token, admitted = True, False, "", False
        for action in actions:
            if action == "cancel":
                rig.server.cancel("r1", 0)
                if standing:
                    assert isinstance(await writer.hear(), Fence)
                standing = False
                continue
            if action in ("progress", "withdraw"):
                writer.say(_other(grant, action))
                standing = standing and action == "progress"
                if not standing:
                    await until(lambda: rig.server.stats().pending == 0)
                continue
            commit = _commit(writer, grant, manifest, action)
            writer.say(commit)
            again = (commit.manifest is not None and written) or (commit.first is not None and token != "")
            if not standing or again or action in ("other_epoch", "nothing"):
                assert isinstance(await writer.hear(), Rejected)
                continue
            written = written or commit.manifest is not None
            token = token or (commit.weight_version if commit.first is not None else "")
            if action == "wrong" or (written and token):
                admitted = action != "wrong" and token == "w1"
                assert isinstance(await writer.hear(), Accepted if admitted else Rejected)
                standing = False
        if standing:
            writer.say(_other(grant, "withdraw"))
        await until(lambda: rig.server.stats().pending == 0)
        assert list(rig.pool.admitted) == (["r1"] if admitted else [])
        assert len(rig.pool.free_blocks) == 32 - 5 * admitted
        with contextlib.suppress(TransferError, TimeoutError):
            assert not isinstance(await writer.hear(0.01), Accepted)


def _other(grant: Grant, action: str) -> Progress | Withdraw:
    if action == "withdraw":
        return Withdraw(request_id=grant.request_id, attempt=0)
    return Progress(lease_id=grant.lease_id, epoch=grant.epoch, layers=((0, 5), (2, 3)))


def _commit(writer: RawWriter, grant: Grant, manifest: Manifest, action: str) -> Commit:
    match action:
        case "manifest":
            return writer.commit(grant, manifest, first=None)
        case "wrong":
            return writer.commit(grant, changed(manifest), first=None)
        case "token":
            return writer.commit(grant, None)
        case "old_token":
            return writer.commit(grant, None, weight_version="w0")
        case "other_epoch":
            return writer.commit(grant, manifest, epoch=grant.epoch + 1)
        case "nothing":
            return writer.commit(grant, None, first=None)
        case _:
            return writer.commit(grant, manifest)
