"""A writer that breaks the rules of the control channel where a test wants it to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from kv_transfer.control import Channel
from kv_transfer.layout import CopyPlan, PlaneLayer, merge_runs
from kv_transfer.link import LeaseKey
from kv_transfer.manifest import ManifestBuilder
from kv_transfer.shm import ShmLink
from kv_transfer.tcp import TcpLink
from kv_transfer.transports import offer
from llm_engine.api.handoff import (
    PROTOCOL_VERSION,
    Commit,
    Connect,
    Connected,
    Grant,
    Manifest,
    Offer,
    ReceiverMessage,
    Tokens,
)
from llm_engine.api.messages import Codec, Message
from tests.unit.kv_transfer.rig import FIRST, KEY, Rig, make_info, make_submit


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

    async def granted(self, request_id: str, num_tokens: int, attempt: int = 0, *, tokens: bool = True) -> Grant:
        submit = make_submit(request_id, num_tokens, self.rig.target, attempt=attempt)
        head = msgspec.structs.replace(submit, tokens=b"")
        self.say(Offer(submit=head, num_tokens=num_tokens, weight_version="w1"))
        grant = await self.hear()
        assert isinstance(grant, Grant)
        if tokens:
            self.say(self.tokens(grant, submit.tokens))
        return grant

    def tokens(self, grant: Grant, tokens: bytes, **changes: Any) -> Tokens:
        fields = {name: getattr(grant, name) for name in ("request_id", "attempt", "lease_id", "epoch")}
        return Tokens(**{**fields, "tokens": tokens, **changes})

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

    def commit(self, grant: Grant, manifest: Manifest | None, **changes: Any) -> Commit:
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
