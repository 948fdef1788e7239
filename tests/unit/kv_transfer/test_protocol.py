"""Peers that have a session and break its rules: repeated, contradictory, late and missing messages."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from kv_transfer.link import Copy, LeaseKey
from llm_engine.api.errors import TransferError
from llm_engine.api.handoff import (
    Accepted,
    Commit,
    Fence,
    Fenced,
    Grant,
    Manifest,
    Probe,
    ProbeCommit,
    ProbeGrant,
    ProbeResult,
    Rejected,
    Withdraw,
)
from llm_engine.api.messages import Message
from tests.unit.kv_transfer.raw_writer import RawWriter, raw_writers
from tests.unit.kv_transfer.rig import Rig, until


async def test_an_honest_commit_is_accepted_once() -> None:
    async with Rig("auto") as rig, raw_writers(rig) as [writer]:
        grant = await writer.granted("r1", 20)
        commit = writer.commit(grant, writer.send_blocks(grant))
        writer.say(commit)
        assert isinstance(await writer.hear(), Accepted)
        writer.say(commit)
        answer = await writer.hear()
        assert isinstance(answer, Rejected)
        assert answer.reason == "the lease is gone"
        assert list(rig.pool.admitted) == ["r1"]


def _without_last_plane(manifest: Manifest) -> Manifest:
    return msgspec.structs.replace(manifest, planes=manifest.planes[:-1])


def _one_block_less(manifest: Manifest) -> Manifest:
    first = manifest.planes[0]
    return msgspec.structs.replace(
        manifest, planes=(msgspec.structs.replace(first, num_blocks=first.num_blocks - 1), *manifest.planes[1:])
    )


def _one_layer_less(manifest: Manifest) -> Manifest:
    first = manifest.planes[0]
    return msgspec.structs.replace(
        manifest, planes=(msgspec.structs.replace(first, checksums=first.checksums[:-1]), *manifest.planes[1:])
    )


def _layers_swapped(manifest: Manifest) -> Manifest:
    first = manifest.planes[1]
    swapped = msgspec.structs.replace(first, checksums=first.checksums[::-1])
    return msgspec.structs.replace(manifest, planes=(manifest.planes[0], swapped, *manifest.planes[2:]))


def _no_checksums(manifest: Manifest) -> Manifest:
    return msgspec.structs.replace(
        manifest, planes=tuple(msgspec.structs.replace(p, checksums=()) for p in manifest.planes)
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_without_last_plane, "manifest has planes"),
        (_one_block_less, "plane latent: 4 blocks"),
        (_one_layer_less, "plane latent: 2 checksums for 3 layers"),
        (_layers_swapped, "plane index, layer 0: the bytes here are not"),
        (_no_checksums, "0 checksums"),
        (lambda m: msgspec.structs.replace(m, num_tokens=16), "covers 16 tokens"),
    ],
)
@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_a_manifest_must_be_complete(transport: str, change: Any, reason: str) -> None:
    async with Rig("auto") as rig, raw_writers(rig, transport=transport) as [writer]:
        grant = await writer.granted("r1", 20)
        writer.say(writer.commit(grant, change(writer.send_blocks(grant))))
        answer = await writer.hear()
        assert isinstance(answer, Rejected)
        assert reason in answer.reason
        assert len(rig.pool.free_blocks) == 32
        assert rig.server.stats().failed == {"rejected": 1}


@pytest.mark.parametrize(
    "changes", [{"epoch": 99}, {"lease_id": 1}, {"request_id": "other"}, {"attempt": 3}], ids=lambda c: next(iter(c))
)
async def test_a_commit_must_name_its_lease_exactly(changes: dict[str, Any]) -> None:
    async with Rig("auto") as rig, raw_writers(rig) as [writer]:
        grant = await writer.granted("r1", 20)
        manifest = writer.send_blocks(grant)
        writer.say(writer.commit(grant, manifest, **changes))
        assert isinstance(await writer.hear(), Rejected)
        assert not rig.pool.admitted
        writer.say(writer.commit(grant, manifest))
        assert isinstance(await writer.hear(), Accepted)


async def test_other_weights_at_commit_are_rejected() -> None:
    async with Rig("auto") as rig, raw_writers(rig) as [writer]:
        grant = await writer.granted("r1", 20)
        writer.say(writer.commit(grant, writer.send_blocks(grant), weight_version="w0"))
        answer = await writer.hear()
        assert isinstance(answer, Rejected)
        assert "weights w0" in answer.reason


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_nothing_written_is_rejected(transport: str) -> None:
    async with Rig("auto") as rig, raw_writers(rig, transport=transport) as [writer]:
        honest = await writer.granted("r0", 20)
        manifest = writer.send_blocks(honest)
        writer.say(writer.commit(honest, manifest))
        assert isinstance(await writer.hear(), Accepted)
        grant = await writer.granted("r1", 20)  # claims the same bytes without having sent them
        writer.say(writer.commit(grant, manifest))
        assert isinstance(await writer.hear(), Rejected)
        assert list(rig.pool.admitted) == ["r0"]


@pytest.mark.parametrize("accepted", [True, False])
async def test_what_arrives_after_the_commit_changes_nothing(accepted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes may be overtaken by the commit that covers them, but never change what has been verified."""
    async with Rig("auto") as rig, raw_writers(rig) as [writer]:
        hashing, go_on = asyncio.Event(), asyncio.Event()
        check = rig.intakes._verifier.check

        async def slow(*args: Any) -> str | None:
            verdict = await check(*args)
            hashing.set()
            await go_on.wait()
            return verdict if accepted else "not what was sent"

        monkeypatch.setattr(rig.intakes._verifier, "check", slow)
        grant = await writer.granted("r1", 20)
        writer.say(writer.commit(grant, writer.send_blocks(grant)))
        await hashing.wait()
        before = bytes(rig.arena.buffer)
        target = rig.layout.planes[0].address(0, grant.blocks[0], rig.layout.num_blocks)
        lease = LeaseKey(grant.lease_id, grant.epoch)
        writer.link.write(lease, memoryview(bytes(96)), [Copy(0, target, 96)], lambda: False)
        assert await asyncio.wrap_future(writer.link.confirm(lease)) == 0
        go_on.set()
        assert isinstance(await writer.hear(), Accepted if accepted else Rejected)
        assert rig.arena.buffer == before


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("end", ["accepted", "cancelled"])
async def test_a_writer_may_die_right_after_its_commit(
    transport: str, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Rig("auto") as rig, raw_writers(rig, transport=transport) as [writer]:
        hashing, go_on = asyncio.Event(), asyncio.Event()
        check = rig.intakes._verifier.check

        async def slow(*args: Any) -> str | None:
            hashing.set()
            await go_on.wait()
            return await check(*args)

        monkeypatch.setattr(rig.intakes._verifier, "check", slow)
        grant = await writer.granted("r1", 20)
        writer.say(writer.commit(grant, writer.send_blocks(grant)))
        await hashing.wait()
        writer.link.close()
        await until(lambda: rig.server.stats().peers == ())
        if end == "cancelled":
            rig.server.cancel("r1", 0)
            assert len(rig.pool.free_blocks) == 32  # the writer is gone: no quarantine
        go_on.set()
        await until(lambda: rig.server.stats().pending == 0)
        assert list(rig.pool.admitted) == (["r1"] if end == "accepted" else [])


async def test_one_writer_can_not_speak_for_another() -> None:
    async with Rig("auto") as rig, raw_writers(rig, 2, "shm") as [owner, impostor]:
        grant = await owner.granted("r1", 20)
        manifest = owner.send_blocks(grant)
        impostor.say(impostor.commit(grant, manifest))
        assert isinstance(await impostor.hear(), Rejected)
        impostor.say(Withdraw(request_id="r1", attempt=0))
        rig.server.cancel("r1", 0)
        assert isinstance(await owner.hear(), Fence)
        impostor.say(Fenced(lease_id=grant.lease_id, epoch=grant.epoch))
        owner.say(Fenced(lease_id=grant.lease_id, epoch=grant.epoch + 1))
        impostor.say(Commit(**msgspec.structs.asdict(owner.commit(grant, manifest))))
        assert isinstance(await impostor.hear(), Rejected)  # so everything before it has been read, too
        await rig_settles(owner)
        assert rig.server.stats().quarantined_blocks == rig.pool.count("quarantined") == 5
        owner.say(Fenced(lease_id=grant.lease_id, epoch=grant.epoch))
        await until(lambda: rig.server.stats().quarantined_blocks == 0)
        assert len(rig.pool.free_blocks) == 31  # all but the probe's


async def rig_settles(writer: RawWriter) -> None:
    """Wait until the receiver has read everything that this writer has said."""
    writer.say(Probe(nonce=1))
    while not isinstance(await writer.hear(), ProbeGrant | ProbeResult):
        pass


async def test_a_fence_that_got_lost_is_repeated() -> None:
    async with Rig("auto") as rig, raw_writers(rig, transport="shm") as [writer]:
        grant = await writer.granted("r1", 20)
        rig.server.cancel("r1", 0)
        assert isinstance(await writer.hear(), Fence)
        again = await writer.hear()
        assert again == Fence(request_id="r1", attempt=0, lease_id=grant.lease_id, epoch=grant.epoch)
        writer.say(Fenced(lease_id=again.lease_id, epoch=again.epoch))
        await until(lambda: len(rig.pool.free_blocks) == 32)


async def test_a_revoked_shm_lease_waits_for_the_end_of_the_writer() -> None:
    async with Rig("auto") as rig, raw_writers(rig, transport="shm") as [writer]:
        await writer.granted("r1", 20)
        rig.server.cancel("r1", 0)
        await writer.hear()
        assert rig.server.stats().quarantined_leases == 1
        with pytest.raises(TimeoutError):  # it has stopped answering; no timer frees its blocks
            await until(lambda: rig.server.stats().quarantined_leases == 0, 0.5)
        writer.link.close()
        await until(lambda: len(rig.pool.free_blocks) == 32)


async def test_a_revoked_tcp_lease_is_free_at_once() -> None:
    async with Rig("auto") as rig, raw_writers(rig, transport="tcp") as [writer]:
        await writer.granted("r1", 20)
        rig.server.cancel("r1", 0)
        assert len(rig.pool.free_blocks) == 32
        assert rig.server.stats().quarantined_leases == 0


@pytest.mark.parametrize(
    "damage", [{"blocks": (0,)}, {"have_tokens": 3}, {"blocks": (0, 1, 2, 3, 99)}, {"blocks": (1,) * 5}]
)
async def test_a_writer_checks_the_grant(damage: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    async with Rig("auto") as rig:
        intakes = rig.intakes
        send = intakes._send_or_raise

        def damaged(pair: Any, message: Message) -> None:
            send(pair, msgspec.structs.replace(message, **damage) if isinstance(message, Grant) else message)

        monkeypatch.setattr(intakes, "_send_or_raise", damaged)
        with pytest.raises(TransferError, match="grant"):
            await rig.hand_off("r1", 20)
        await until(lambda: len(rig.pool.free_blocks) == 32)


async def test_a_probe_commit_without_its_lease_fails() -> None:
    async with Rig("auto") as rig, raw_writers(rig) as [writer]:
        writer.say(ProbeCommit(nonce=4, lease_id=1, checksum=0))
        answer = await writer.hear()
        assert isinstance(answer, ProbeResult)
        assert not answer.ok
