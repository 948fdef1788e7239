"""Who gets a session: other versions, strangers, stale addresses, tickets; and frames that belong to none."""

from __future__ import annotations

import asyncio
import os

import msgspec
import pytest

from kv_transfer.tcp import TcpLink
from llm_engine.api.errors import TransferError
from llm_engine.api.handoff import (
    PROTOCOL_VERSION,
    Connect,
    Offer,
    Probe,
    ProbeResult,
    Refused,
    Withdraw,
)
from tests.unit.kv_transfer.raw_writer import RawWriter, raw_writers
from tests.unit.kv_transfer.rig import KEY, Rig, make_info, make_submit, until


async def test_a_session_ends_with_its_data_connection() -> None:
    async with Rig("auto") as rig, raw_writers(rig) as [writer]:
        writer.link.close()
        await until(lambda: len(rig.server.stats().peers) == 0)
        writer.say(Offer(submit=make_submit("r1", 20, rig.target), num_tokens=20, weight_version="w1"))
        await until(lambda: rig.server.stats().dropped_frames == 1)


async def test_a_ticket_is_good_for_one_connection() -> None:
    async with Rig("tcp") as rig, raw_writers(rig) as [writer]:
        address = rig.server._entrances["tcp"].inlet.offer()
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
