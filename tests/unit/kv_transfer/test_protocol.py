"""Peers that break the rules of the control channel: forged, stray, repeated and contradictory messages."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from kv_transfer.control import Channel
from kv_transfer.layout import CopyPlan, PlaneLayer, merge_runs
from kv_transfer.link import Copy, LeaseKey
from kv_transfer.manifest import ManifestBuilder
from kv_transfer.shm import ShmLink
from kv_transfer.tcp import TcpLink
from kv_transfer.transports import offer
from llm_engine.api.errors import TransferError
from llm_engine.api.handoff import (
    PROTOCOL_VERSION,
    Accepted,
    Commit,
    Connect,
    Connected,
    Fence,
    Fenced,
    Grant,
    Manifest,
    Offer,
    Probe,
    ProbeCommit,
    ProbeGrant,
    ProbeResult,
    ReceiverMessage,
    Refused,
    Rejected,
    Withdraw,
)
from llm_engine.api.messages import Codec, Message
from tests.unit.kv_transfer.rig import FIRST, KEY, Rig, make_info, make_submit, until


class RawWriter:
    """A writer that says exactly what it is told to say."""

    def __init__(self, rig: Rig, channel: Channel, key: bytes = KEY) -> None:
        self.rig = rig
        self.codec: Codec[ReceiverMessage] = Codec(key, ReceiverMessage)
        self.channel = channel
        self.link: Any = None

    @classmethod
    async def reach(cls, rig: Rig, key: bytes = KEY) -> RawWriter:
        return cls(rig, await Channel.connect(rig.target.control_addr), key)

    def say(self, message: Message) -> None:
        self.channel.send(self.codec.encode(message))

    async def hear(self, timeout_s: float = 5.0) -> ReceiverMessage:
        async with asyncio.timeout(timeout_s):
            return self.codec.decode(await self.channel.recv())

    async def connect(self, name: str = "raw", transport: str = "tcp") -> None:
        links = (offer(transport, None),)
        info = make_info(name, f"{name}-1", self.rig.source_layout)
        self.say(Connect(version=PROTOCOL_VERSION, info=info, layout=self.rig.source_layout, links=links))
        answer = await self.hear()
        assert isinstance(answer, Connected)
        common: dict[str, Any] = {"ticket": answer.ticket, "region": answer.region, "on_lost": lambda _: None}
        if transport == "shm":
            size = answer.layout.arena_bytes
            self.link = await asyncio.to_thread(ShmLink.connect, answer.link, KEY, region_bytes=size, **common)
        else:
            self.link = await asyncio.to_thread(TcpLink.connect, answer.link, KEY, stall_timeout_s=5, **common)

    async def granted(self, request_id: str, num_tokens: int, attempt: int = 0) -> Grant:
        submit = make_submit(request_id, num_tokens, self.rig.target, attempt=attempt)
        self.say(Offer(submit=submit, num_tokens=num_tokens, weight_version="w1"))
        grant = await self.hear()
        assert isinstance(grant, Grant)
        return grant

    def send_blocks(self, grant: Grant) -> Manifest:
        """Write source blocks 0… under the grant; the honest manifest."""
        rig = self.rig
        plan = CopyPlan(rig.source_layout, rig.layout)
        builder = ManifestBuilder(rig.source_layout, "full", LeaseKey(0, 0))
        runs = merge_runs(range(len(grant.blocks)), grant.blocks)
        for index, plane in enumerate(rig.source_layout.planes):
            for layer in range(plane.num_layers):
                row = PlaneLayer(index, layer)
                copies = list(plan.copies(row, runs))
                for copy in copies:
                    builder.add(row, rig.source.buffer[copy.source : copy.source + copy.num_bytes])
                self.link.write(LeaseKey(grant.lease_id, grant.epoch), rig.source.buffer, copies, lambda: False)
        self.link.confirm(LeaseKey(grant.lease_id, grant.epoch)).result(5)
        rig.sent[grant.request_id, grant.attempt] = list(range(len(grant.blocks)))
        return builder.build(len(grant.blocks) * 4, len(grant.blocks))

    def commit(self, grant: Grant, manifest: Manifest, **changes: Any) -> Commit:
        fields: dict[str, Any] = {
            "request_id": grant.request_id,
            "attempt": grant.attempt,
            "lease_id": grant.lease_id,
            "epoch": grant.epoch,
            "manifest": manifest,
            "first": FIRST,
            "weight_version": "w1",
            "compute_end_age_s": 0.0,
        }
        return Commit(**{**fields, **changes})

    def close(self) -> None:
        if self.link is not None:
            self.link.close()
        self.channel.close()


@asynccontextmanager
async def raw_writers(rig: Rig, count: int = 1, transport: str = "tcp") -> AsyncIterator[list[RawWriter]]:
    writers = [await RawWriter.reach(rig) for _ in range(count)]
    try:
        for index, writer in enumerate(writers):
            await writer.connect(f"raw-{index}", transport)
        yield writers
    finally:
        for writer in writers:
            writer.close()


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
        check = rig.server._intakes._verifier.check

        async def slow(*args: Any) -> str | None:
            verdict = await check(*args)
            hashing.set()
            await go_on.wait()
            return verdict if accepted else "not what was sent"

        monkeypatch.setattr(rig.server._intakes._verifier, "check", slow)
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
        check = rig.server._intakes._verifier.check

        async def slow(*args: Any) -> str | None:
            hashing.set()
            await go_on.wait()
            return await check(*args)

        monkeypatch.setattr(rig.server._intakes._verifier, "check", slow)
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


async def test_an_offer_without_a_data_connection_is_refused() -> None:
    async with Rig("auto") as rig, raw_writers(rig) as [writer]:
        writer.link.close()
        await until(lambda: len(rig.server.stats().peers) == 0)
        writer.say(Offer(submit=make_submit("r1", 20, rig.target), num_tokens=20, weight_version="w1"))
        await until(lambda: rig.server.stats().dropped_frames == 1)  # the session ended with its connection


async def test_a_ticket_is_good_for_one_connection() -> None:
    async with Rig("tcp") as rig, raw_writers(rig) as [writer]:
        address = rig.server._inlets["tcp"].offer()
        for ticket in ("", "guess"):
            with pytest.raises(TransferError, match="unknown pairing"):
                await asyncio.to_thread(
                    TcpLink.connect,
                    address,
                    KEY,
                    ticket=ticket,
                    region=rig.arena.region,
                    stall_timeout_s=1,
                    on_lost=lambda _: None,
                )
        assert rig.server.stats().refused_connections == {"peer": 2}
        await writer.granted("r1", 4)
        writer.say(Withdraw(request_id="r1", attempt=0))


async def test_other_protocol_versions_are_refused() -> None:
    async with Rig("auto") as rig:
        writer = await RawWriter.reach(rig)
        info = make_info("raw", "raw-1", rig.source_layout)
        writer.say(Connect(version=PROTOCOL_VERSION + 1, info=info, layout=rig.source_layout, links=()))
        answer = await writer.hear()
        assert isinstance(answer, Refused)
        assert (answer.code, answer.retryable) == ("version", False)
        writer.close()


async def test_frames_that_are_not_authentic_or_not_messages_are_counted_and_dropped() -> None:
    async with Rig("auto") as rig, raw_writers(rig) as [writer]:
        stranger = await RawWriter.reach(rig, key=b"s" * 32)
        stranger.say(Connect(version=1, info=make_info("s", "s", rig.layout), layout=rig.layout, links=()))
        authentic = await RawWriter.reach(rig)
        authentic.say(Probe(nonce=1))  # has not connected
        for frame in (b"", os.urandom(200), writer.codec.encode(ProbeResult(nonce=1, ok=True))):
            writer.channel.send(frame)
        writer.channel.send(writer.codec.encode(Withdraw(request_id="r", attempt=0)) + b"x")
        await until(lambda: rig.server.stats().dropped_frames == 6)
        await rig.hand_off("r1", 20)
        stranger.close()
        authentic.close()


async def test_a_client_with_another_secret_gets_nowhere() -> None:
    async with Rig("auto", key=b"o" * 32, grant_timeout_s=0.4) as rig:
        with pytest.raises(TransferError):
            await rig.hand_off("r1", 20)
        assert rig.client.bad_peers() == ["d0"]
        assert rig.server.stats().dropped_frames >= 1
        assert rig.server.stats().offered == 0


async def test_a_restarted_receiver_is_not_taken_for_the_old_one() -> None:
    async with Rig("auto") as rig:
        rig.target = msgspec.structs.replace(rig.target, incarnation="older")
        with pytest.raises(TransferError, match="decode-0 restarted: d0 is not older"):
            await rig.hand_off("r1", 20)
        rig.target = msgspec.structs.replace(rig.target, incarnation="d0")
        await rig.hand_off("r2", 20)
        assert rig.client.bad_peers() == ["older"]  # its present life is judged by itself


async def test_a_dead_address_fails_at_once() -> None:
    async with Rig("auto") as rig:
        rig.target = msgspec.structs.replace(rig.target, control_addr="tcp://127.0.0.1:1")
        with pytest.raises(TransferError, match=r"decode-0 at tcp://127\.0\.0\.1:1"):
            await asyncio.wait_for(rig.hand_off("r1", 20), 2)


@pytest.mark.parametrize(
    "damage", [{"blocks": (0,)}, {"have_tokens": 3}, {"blocks": (0, 1, 2, 3, 99)}, {"blocks": (1,) * 5}]
)
async def test_a_writer_checks_the_grant(damage: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    async with Rig("auto") as rig:
        intakes = rig.server._intakes
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
