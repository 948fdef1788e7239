"""One end of a hand-off in a process of its own: `python -m tests.unit.kv_transfer.peer_process {json}`.

Prints one JSON line per event; reads commands, one a line, from stdin.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from kv_transfer.link import Copy, LeaseKey, Link, Sent, no_news
from kv_transfer.memory import Arena
from kv_transfer.receiver import HandoffServer
from kv_transfer.writer import Handoff, HandoffClient
from llm_engine.api.config import TransferConfig
from llm_engine.api.errors import TransferError
from llm_engine.api.messages import Peer
from tests.unit.kv_transfer.rig import BLOCK_TOKENS, FIRST, KEY, Pool, make_info, make_layout, make_submit


def say(event: str, **fields: Any) -> None:
    print(json.dumps({"event": event, **fields}), flush=True)


class Relentless:
    """A link that writes every batch again and again until told to stop: something is always in flight."""

    def __init__(self, inner: Link) -> None:
        self.transport = inner.transport
        self._inner = inner

    def write(
        self,
        lease: LeaseKey,
        source: memoryview,
        copies: Sequence[Copy],
        stopped: Callable[[], bool],
        sent: Sent = no_news,
    ) -> None:
        self._inner.write(lease, source, copies, stopped, sent)
        say("writing")
        while True:
            self._inner.write(lease, source, copies, stopped)

    def confirm(self, lease: LeaseKey) -> Future[int | None]:
        return self._inner.confirm(lease)

    def close(self) -> None:
        self._inner.close()


async def commands() -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    return reader


async def writer(settings: dict[str, Any]) -> None:
    """Offers what it is told to; in relentless mode the copies of a hand-off never end by themselves."""
    layout = make_layout(settings["blocks"], scale=settings["scale"])
    source = Arena.create(layout.arena_bytes, shared=False)
    source.buffer[:] = b"\xaa" * source.num_bytes
    client = HandoffClient(
        config=TransferConfig(**settings["config"]),
        key=KEY,
        info=make_info("prefill-0", settings["incarnation"], layout),
        layout=layout,
        source=source.buffer,
        wrap_link=Relentless if settings["relentless"] else lambda link: link,
    )
    running = asyncio.create_task(client.run())
    target = Peer(name="decode-0", incarnation="d0", control_addr=settings["control_addr"])
    reader = await commands()
    say("ready")
    while line := (await reader.readline()).decode():
        request_id, num_blocks, num_layers = json.loads(line)
        submit = make_submit(request_id, num_blocks * BLOCK_TOKENS, target)
        handoff = client.offer(submit, num_blocks * BLOCK_TOKENS, "w1", on_failed=say_failed)
        handoff.layers_ready(range(num_layers), 0, range(num_blocks))
        if num_layers == 4:
            asyncio.create_task(commit(handoff))  # noqa: RUF006
    await client.close()
    await running


def say_failed(handoff: Handoff, error: TransferError) -> None:
    say("failed", request=handoff.request_id, error=str(error))


async def commit(handoff: Handoff) -> None:
    try:
        await handoff.commit(FIRST, compute_end=time.monotonic())
        say("accepted", request=handoff.request_id)
    except TransferError as exc:
        say("rejected", request=handoff.request_id, kind=type(exc).__name__, error=str(exc))


async def receiver(settings: dict[str, Any]) -> None:
    """A plain receiver; says what it admits."""
    layout = make_layout(settings["blocks"], scale=settings["scale"])
    arena = Arena.create(layout.arena_bytes, shared=True)
    pool = Pool(settings["blocks"], on_admit=lambda submit, _: say("admitted", request=submit.request_id))
    config = TransferConfig(**settings["config"])
    server = HandoffServer(config=config, key=KEY, layout=layout, arena=arena, reserver=pool)
    address = server.bind(settings.get("host", "127.0.0.1"))
    running = asyncio.create_task(server.run(make_info("decode-0", settings["incarnation"], layout, address)))
    reader = await commands()
    say("ready", control_addr=address)
    await reader.read()
    await server.close()
    await running


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    asyncio.run({"writer": writer, "receiver": receiver}[arguments["role"]](arguments))
