"""Control and data frames with mutations: the receiver neither crashes nor hangs, and no byte lands outside a lease.

    python -m tests.unit.kv_transfer.test_mutated_frames 1000000

runs as many as it is told; the suite runs a few thousand.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import sys
import time
from collections.abc import Iterator

import msgspec
import pytest

from kv_transfer.auth import Handshake
from kv_transfer.control import Channel
from kv_transfer.transports import offer
from llm_engine.api.errors import TransferError
from llm_engine.api.handoff import (
    PROTOCOL_VERSION,
    Commit,
    Connect,
    Connected,
    Fenced,
    Grant,
    Manifest,
    Offer,
    Probe,
    ProbeCommit,
    Progress,
    ReceiverMessage,
    Refused,
    Tokens,
    Withdraw,
)
from llm_engine.api.messages import Codec, Message
from tests.unit.kv_transfer.rig import FIRST, KEY, Rig, make_info, make_submit, until

_HUGE = (0, 1, -1, 2**31, 2**53, 2**62, -(2**62))
_DATA_HEADER = struct.Struct("<BxxxIQQQ")


def mutate(message: Message, rng: random.Random) -> Message:
    """The same kind of message with fields that no honest writer sends, correctly signed."""
    changes: dict[str, object] = {}
    for field in rng.sample(message.__struct_fields__, rng.randint(1, len(message.__struct_fields__))):
        value = getattr(message, field)
        if isinstance(value, bool) or value is None:
            continue
        if isinstance(value, int):
            changes[field] = rng.choice((*_HUGE, value + 1, value - 1, value ^ (1 << rng.randrange(40))))
        elif isinstance(value, bytes):
            changes[field] = rng.choice((b"", value[:-1], value + b"\0", value[::-1], value * 3))
        elif isinstance(value, str):
            changes[field] = rng.choice(("", "x" * 300, value[::-1], value + "\0"))
        elif isinstance(value, tuple) and value and isinstance(value[0], tuple):
            changes[field] = tuple((rng.choice(_HUGE), rng.choice(_HUGE)) for _ in range(rng.randrange(40)))
        elif isinstance(value, tuple):
            changes[field] = value[: rng.randrange(len(value) + 1)] * rng.randrange(3)
        elif isinstance(value, Manifest):
            planes = list(value.planes) * rng.randrange(3)
            changes[field] = Manifest(num_tokens=rng.choice(_HUGE), planes=tuple(planes))
    return msgspec.structs.replace(message, **changes)


def garble(frame: bytes, rng: random.Random) -> bytes:
    """A frame with changed, missing or added bytes; its signature does not fit any more."""
    data = bytearray(frame)
    for _ in range(rng.randint(1, 8)):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    cut = rng.choice((0, 0, 1, len(data) // 2))
    return bytes(data[: len(data) - cut]) + rng.randbytes(rng.choice((0, 0, 3)))


class Attacker:
    """A writer with the cluster's key that keeps no rule. It holds one lease, into whose blocks it may write."""

    def __init__(self, rig: Rig, seed: int) -> None:
        self.rig, self.rng = rig, random.Random(seed)
        self.codec: Codec[ReceiverMessage] = Codec(KEY, ReceiverMessage)
        self.channel: Channel
        self.number = 0

    async def begin(self, seed: int = 0) -> None:
        self.channel = await Channel.connect(self.rig.target.control_addr)
        layout = self.rig.source_layout
        hello = Connect(
            version=PROTOCOL_VERSION, info=make_info("a", "a1", layout), layout=layout, links=(offer("tcp", None),)
        )
        self.hello = hello
        connected = await self.ask(hello, Connected)
        host, _, port = connected.link.address.rpartition(":")
        self.data = await asyncio.to_thread(socket.create_connection, (host, int(port)))
        handshake = Handshake(self.data, KEY)
        await asyncio.to_thread(
            lambda: handshake.introduce(transport="tcp", ticket=connected.ticket, region=connected.region)
        )
        self.data.settimeout(5)
        whole = make_submit(f"victim-{seed}", 16, self.rig.target, deadline_s=600)
        submit = msgspec.structs.replace(whole, tokens=b"")
        self.offer = Offer(submit=submit, num_tokens=16, weight_version="w1")
        self.grant = await self.ask(self.offer, Grant)
        lease = {"lease_id": self.grant.lease_id, "epoch": self.grant.epoch}
        self.tokens = Tokens(request_id=submit.request_id, attempt=0, tokens=whole.tokens, **lease)

    async def ask(self, message: Message, kind: type) -> Message:  # type: ignore[type-arg]
        self.channel.send(self.codec.encode(message))
        async with asyncio.timeout(10):
            while not isinstance(answer := self.codec.decode(await self.channel.recv()), kind):
                assert not isinstance(answer, Refused), answer
        return answer

    async def ignore_answers(self) -> None:
        while True:
            await self.channel.recv()

    def honest(self) -> Iterator[Message]:
        """One message of every kind, as an honest writer would send it under the lease."""
        grant, lease = self.grant, {"lease_id": self.grant.lease_id, "epoch": self.grant.epoch}
        self.number += 1
        new = msgspec.structs.replace(self.offer.submit, request_id=f"n{self.number}")
        yield self.hello
        yield msgspec.structs.replace(self.offer, submit=new)
        yield self.tokens
        yield Progress(layers=((0, 1), (1, 2)), **lease)
        commit = Commit(request_id=grant.request_id, attempt=0, weight_version="w1", **lease)
        manifest = Manifest(num_tokens=16, planes=())
        yield commit
        yield msgspec.structs.replace(commit, first=FIRST)
        yield msgspec.structs.replace(commit, manifest=manifest)
        yield msgspec.structs.replace(commit, manifest=manifest, first=FIRST)
        yield Withdraw(request_id=f"n{self.number - 1}", attempt=0)
        yield Fenced(**lease)
        yield Probe(nonce=self.number)
        yield ProbeCommit(nonce=self.number, lease_id=grant.lease_id, checksum=1)

    def control_frames(self, count: int) -> Iterator[bytes]:
        """Mutations of messages (signed) and of frames (not)."""
        while True:
            for message in self.honest():
                for _ in range(8):
                    changed = mutate(message, self.rng)
                    with contextlib.suppress(OverflowError, msgspec.MsgspecError):  # can't be told on the wire
                        frame = self.codec.encode(changed)
                        yield frame if self.rng.random() < 0.7 else garble(frame, self.rng)
                        count -= 1
                        if count == 0:
                            return


async def bombard(count: int, seed: int, *, report: bool = False) -> dict[str, int]:
    """Send `count` mutated frames to a receiver that serves an honest writer too. Returns what the receiver counted."""
    async with Rig("tcp", num_blocks=32, max_pending=64, commit_timeout_s=20) as rig:
        attacker = Attacker(rig, seed)
        await attacker.begin()
        ignoring = asyncio.create_task(attacker.ignore_answers())
        done, started = 0, time.monotonic()
        for frame in attacker.control_frames(count):
            while True:
                try:
                    attacker.channel.send(frame)
                    break
                except TransferError:  # the queue is full: the receiver is busy reading
                    await asyncio.sleep(0.001)
            done += 1
            if done % 64 == 0:
                await asyncio.sleep(0)
            if done % max(1000, count // 20) == 0:
                await serve_somebody_else(rig, f"honest-{done}")
                if report:
                    print(f"{done} frames, {done / (time.monotonic() - started):.0f}/s", flush=True)
        await serve_somebody_else(rig, "last")
        assert rig.pool.admitted == {}, "nothing that the attacker sent was admitted"
        attacker.data.close()
        ignoring.cancel()
        attacker.channel.close()
        stats = rig.server.stats()
    return {"frames": done, "dropped": stats.dropped_frames, **stats.failed}


async def serve_somebody_else(rig: Rig, request_id: str) -> None:
    """An honest hand-off, byte for byte. What the attacker was granted, like others, is taken back for it."""
    async with asyncio.timeout(30):
        for attempt in range(1000):
            handing = asyncio.create_task(rig.hand_off(request_id, 16, attempt=attempt))
            while not handing.done():
                _evict(rig, {request_id, "victim-0"})
                await asyncio.wait([handing], timeout=0.005)
            if handing.exception() is None:
                break
            assert "hand-offs are pending" in str(handing.exception())  # a full queue refuses: bounded, not broken
    rig.pool.finish(request_id)


def _evict(rig: Rig, keep: set[str]) -> None:
    intakes = rig.intakes
    held = [(lease.request_id, lease.attempt) for lease in intakes.custody.leases]
    waiting = [(item.request_id, item.attempt) for item in tuple(intakes.offers._waiting.values())]
    for request_id, attempt in held + waiting:
        if request_id not in keep:
            rig.server.cancel(request_id, attempt)


async def test_mutated_control_frames_change_nothing() -> None:
    counted = await bombard(3000, seed=1)
    assert counted["frames"] == 3000
    assert counted["dropped"] > 300, "garbled frames are dropped"
    assert counted.get("stale_commit", 0) + counted.get("rejected", 0) > 0, "mutated commits are refused"


@pytest.mark.slow
@pytest.mark.timeout(1200)
async def test_many_more_mutated_control_frames() -> None:
    assert (await bombard(200_000, seed=2))["frames"] == 200_000


@pytest.mark.parametrize("seed", range(4))
async def test_mutated_data_frames_land_nowhere_else(seed: int) -> None:
    """Headers and range tables with wild numbers; each connection lives until the receiver cuts it."""
    rng = random.Random(seed)
    async with Rig("tcp", num_blocks=32) as rig:
        for number in range(12):
            attacker = Attacker(rig, rng.randrange(1 << 30))
            await attacker.begin(number)
            allowed = set(attacker.grant.blocks)
            outside = [b for b in range(32) if b not in allowed]
            before = _bytes_of(rig, outside)
            with contextlib.suppress(OSError):
                for _ in range(40):
                    await asyncio.to_thread(attacker.data.sendall, _data_frame(attacker, rng))
            attacker.data.close()
            attacker.channel.close()
            await until(lambda: rig.pool.count("leased") == 0)
            assert _bytes_of(rig, outside) == before
        await rig.hand_off("last", 64)


def _data_frame(attacker: Attacker, rng: random.Random) -> bytes:
    plane = attacker.rig.layout.planes[rng.randrange(4)]
    block = rng.choice((attacker.grant.blocks[0], rng.randrange(64)))
    offset = plane.address(rng.randrange(plane.num_layers), block, 32) + rng.choice((0, 0, 0, 1, -1))
    length = plane.block_bytes * rng.choice((1, 1, 2, 5))
    ranges = [(offset % 2**64, length)] * rng.choice((1, 1, 2))
    if rng.random() < 0.2:
        ranges.append((rng.choice(_HUGE) % 2**64, rng.choice(_HUGE) % 2**64))
    total = sum(length for _, length in ranges) + rng.choice((0, 0, 0, 7))
    kind = rng.choice((1, 1, 1, 1, 2, 9))
    epoch = attacker.grant.epoch + rng.choice((0, 0, 0, 1, -1))
    header = _DATA_HEADER.pack(kind, len(ranges), attacker.grant.lease_id, epoch, total % 2**64)
    return header + b"".join(struct.pack("<QQ", *item) for item in ranges) + rng.randbytes(min(total, 4096) % 4096)


def _bytes_of(rig: Rig, blocks: list[int]) -> bytes:
    parts = []
    for plane in rig.layout.planes:
        for layer in range(plane.num_layers):
            for block in blocks:
                start = plane.address(layer, block, rig.layout.num_blocks)
                parts.append(bytes(rig.arena.buffer[start : start + plane.block_bytes]))
    return b"".join(parts)


if __name__ == "__main__":
    print(asyncio.run(bombard(int(sys.argv[1]), seed=int(sys.argv[2]) if len(sys.argv) > 2 else 3, report=True)))
