"""The control channel: whole frames in order, bounds towards peers that do not read or do not speak, and its loss."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_transfer import control, control_server
from kv_transfer.control import Channel
from kv_transfer.control_server import ControlServer
from llm_engine.api.errors import TransferError
from tests.unit.kv_transfer.rig import FIRST, Rig, until


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        near = socket.create_connection(listening.getsockname())
        return near, listening.accept()[0]


@asynccontextmanager
async def channels() -> AsyncIterator[tuple[Channel, Channel]]:
    near, far = (Channel(sock) for sock in tcp_pair())
    try:
        yield near, far
    finally:
        near.close()
        far.close()


@settings(max_examples=60, deadline=None)
@given(frames=st.lists(st.binary(max_size=300), max_size=20), seed=st.integers(0, 1 << 30))
def test_frames_arrive_whole_however_they_are_cut(frames: list[bytes], seed: int) -> None:
    async def check() -> None:
        rng = random.Random(seed)
        sender, sock = tcp_pair()
        sender.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        channel = Channel(sock)
        stream = b"".join(struct.pack("<I", len(frame)) + frame for frame in frames)
        while stream:
            size = rng.randint(1, len(stream))
            sender.sendall(stream[:size])
            stream = stream[size:]
            await asyncio.sleep(0)
        async with asyncio.timeout(5):
            assert [await channel.recv() for _ in frames] == frames
            sender.close()
            with pytest.raises(TransferError, match="closed by the peer"):
                await channel.recv()
        channel.close()

    asyncio.run(check())


async def test_threads_may_send_at_once() -> None:
    """Each thread's frames arrive in its order, none of them mixed, also when the kernel does not take them whole."""
    async with channels() as (near, far):
        sizes = [1, 50, 70_000]

        def talk(number: int) -> None:
            for index in range(40):
                near.send(bytes([number, index]) * sizes[index % 3])

        threads = [threading.Thread(target=talk, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        seen: dict[int, int] = dict.fromkeys(range(4), 0)
        async with asyncio.timeout(20):
            for _ in range(4 * 40):
                frame = await far.recv()
                number, index = frame[0], frame[1]
                assert frame == bytes([number, index]) * sizes[index % 3]
                assert index == seen[number]
                seen[number] += 1
        for thread in threads:
            thread.join()


async def test_a_peer_that_does_not_read_is_bounded_and_loses_nothing() -> None:
    async with channels() as (near, far):
        far.trust()
        frame, sent = bytes(1 << 20), 0
        while near._unsent_bytes <= control._QUEUE_BYTES:
            near.send(frame)
            sent += 1
            assert sent < 100
        with pytest.raises(TransferError, match="bytes unread"):
            near.send(frame)
        assert near._unsent_bytes <= control._QUEUE_BYTES + len(frame) + 4
        async with asyncio.timeout(10):
            for _ in range(sent):
                assert await far.recv() == frame
        near.send(b"goes on")
        assert await far.recv() == b"goes on"


async def test_frames_that_nobody_takes_stay_in_the_kernel() -> None:
    async with channels() as (near, far):
        for _ in range(4 * control._QUEUE_FRAMES):
            near.send(bytes(1000))
        await until(lambda: len(far._frames) > control._QUEUE_FRAMES)
        assert len(far._frames) < 3 * control._QUEUE_FRAMES
        async with asyncio.timeout(10):
            for _ in range(4 * control._QUEUE_FRAMES):
                await far.recv()


async def test_a_stranger_may_not_announce_large_frames() -> None:
    async with channels() as (near, far):
        near.send(bytes(control._STRANGER_FRAME_BYTES + 1))
        with pytest.raises(TransferError, match="at most"):
            await far.recv()
    async with channels() as (near, far):
        far.trust()
        near.send(bytes(control._STRANGER_FRAME_BYTES + 1))
        assert len(await far.recv()) == control._STRANGER_FRAME_BYTES + 1


async def test_what_a_handler_raises_ends_the_server() -> None:
    def handle(channel: Channel, frame: bytes) -> bool:
        if frame == b"second":
            raise RuntimeError("a bug")
        return True

    server = ControlServer("127.0.0.1", 0, handle=handle, lost=lambda _: None, refused=lambda _: None)
    running = asyncio.create_task(server.run())
    channel = await Channel.connect(server.address)
    channel.send(b"first")
    channel.send(b"second")
    with pytest.raises(ExceptionGroup) as caught:
        async with asyncio.timeout(5):
            await running
    assert caught.group_contains(RuntimeError, match="a bug")
    with pytest.raises(TransferError):
        await channel.recv()
    channel.close()
    server.close()


async def test_connections_that_say_nothing_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_server, "_INTRODUCTION_S", 0.2)
    monkeypatch.setattr(control_server, "MAX_CHANNELS", 3)
    async with Rig("shm") as rig:
        await rig.hand_off("r1", 20)  # a writer that has introduced itself stays
        silent = [await Channel.connect(rig.target.control_addr) for _ in range(2)]
        silent[0].send(b"not authentic")
        one_too_many = await Channel.connect(rig.target.control_addr)
        for channel in (one_too_many, *silent):
            async with asyncio.timeout(5):
                with pytest.raises(TransferError, match=r"closed by the peer|reset"):
                    await channel.recv()
            channel.close()
        assert rig.server.stats().refused_connections == {"full": 1}
        rig.pool.finish("r1")
        await rig.hand_off("r2", 20)
        assert rig.server.stats().accepted == 2


@pytest.mark.parametrize("transport", ["local", "shm", "tcp"])
async def test_losing_the_control_channel_fails_its_hand_offs_and_frees_their_blocks(transport: str) -> None:
    async with Rig(transport) as rig:
        handoff = rig.offer("r1", 40)
        rig.compute(handoff, layers=range(2))
        await until(handoff._granted.is_set)
        assert rig.server._control is not None
        [channel] = rig.server._control._channels
        channel.close()
        rig.compute(handoff, layers=[2, 3])
        with pytest.raises(TransferError, match=r"closed by the peer|reset|Broken pipe"):
            await handoff.commit(FIRST, compute_end=0.0)
        await until(lambda: len(rig.pool.free_blocks) == 32)  # the writer has unmapped, or its connection is cut
        assert rig.pool.admitted == {}
        await rig.hand_off("r2", 40)


async def test_an_offer_to_a_session_that_has_just_been_lost_waits_for_the_next_one() -> None:
    async with Rig("shm") as rig:
        await rig.hand_off("r1", 40)
        [peer] = rig.client._peers.values()
        assert peer._session is not None
        peer._session.cut(TransferError("lost"))
        await rig.hand_off("r2", 40)
        assert set(rig.pool.admitted) == {"r1", "r2"}
