from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import zmq
import zmq.asyncio

from deploy.control import (
    ClusterStatus,
    ControlClient,
    ControlRefused,
    ControlRequest,
    ControlServer,
    ControlTimeout,
    DrainWorker,
    GetStatus,
    PoolStatus,
    Reply,
    RouterStatus,
    ScalePool,
    WorkerStatus,
)
from deploy.feed import MembershipFeed
from llm_engine.api.messages import Codec, Members, Role, WorkerInfo

KEY, OTHER_KEY = b"k" * 32, b"o" * 32
STATUS = ClusterStatus(
    ready=True,
    model="m",
    router=RouterStatus(url="http://127.0.0.1:1", pid=7, ready=True),
    pools={"decode": PoolStatus(desired=2, ready=1)},
    workers=[WorkerStatus(name="decode-0", role=Role.DECODE, state="ready", pid=8)],
)


def info(name: str) -> WorkerInfo:
    return WorkerInfo(
        name=name,
        role=Role.DECODE,
        incarnation="i",
        pid=1,
        request_addr="tcp://127.0.0.1:1",
        control_addr="tcp://127.0.0.1:2",
        metrics_addr="http://127.0.0.1:3/metrics",
        model="m",
        format_id="f",
        weight_version="w",
        block_tokens=16,
        num_blocks=8,
        max_model_len=64,
        max_num_seqs=4,
    )


@asynccontextmanager
async def served(asked: list[ControlRequest], error: str = "") -> AsyncIterator[str]:
    async def handle(request: ControlRequest) -> Reply:
        asked.append(request)
        return Reply(status=STATUS, error=error)

    context = zmq.asyncio.Context()
    server = ControlServer(context, KEY, handle)
    address = server.bind("tcp://127.0.0.1:*")
    task = asyncio.create_task(server.run())
    try:
        yield address
    finally:
        task.cancel()
        await asyncio.wait({task})
        server.close()
        context.term()


def ask(address: str, request: ControlRequest, key: bytes = KEY, timeout_s: float = 5.0) -> ClusterStatus:
    with ControlClient(address, key) as client:
        return client.ask(request, timeout_s=timeout_s)


async def test_requests_arrive_as_sent_and_the_status_comes_back() -> None:
    asked: list[ControlRequest] = []
    requests: list[ControlRequest] = [GetStatus(), ScalePool(pool="decode", replicas=2), DrainWorker(worker="decode-0")]
    async with served(asked) as address:
        answers = [await asyncio.to_thread(ask, address, request) for request in requests]
    assert asked == requests
    assert answers == [STATUS] * 3


async def test_a_refusal_is_an_error_with_its_reason() -> None:
    async with served([], error="no worker is called 'x'") as address:
        with pytest.raises(ControlRefused, match="no worker is called 'x'"):
            await asyncio.to_thread(ask, address, DrainWorker(worker="x"))


async def test_strangers_get_neither_action_nor_answer() -> None:
    asked: list[ControlRequest] = []
    async with served(asked) as address:
        with pytest.raises(ControlTimeout):
            await asyncio.to_thread(ask, address, GetStatus(), OTHER_KEY, 0.3)
        with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
            socket.linger = 0
            socket.connect(address)
            socket.send(b"junk")
            socket.send_multipart([b"", b"a", b"b"])
        assert await asyncio.to_thread(ask, address, GetStatus()) == STATUS
    assert asked == [GetStatus()]


def test_a_silent_controller_is_a_timeout_not_a_wait() -> None:
    with pytest.raises(ControlTimeout, match="did not answer"):
        ask("tcp://127.0.0.1:9", GetStatus(), timeout_s=0.1)


async def test_the_feed_repeats_the_whole_list_and_counts_changes() -> None:
    context = zmq.asyncio.Context()
    feed = MembershipFeed(context, KEY)
    router = context.socket(zmq.SUB)
    router.linger = 0
    router.subscribe(b"")
    router.connect(feed.bind("tcp://127.0.0.1:*"))
    codec: Codec[Members] = Codec(KEY, Members)

    async def heard() -> Members:
        async with asyncio.timeout(10.0):
            while not await router.poll(20):
                await feed.publish(current)
            latest = await router.recv()
            while await router.poll(0):
                latest = await router.recv()
            return codec.decode(latest)

    current = [info("decode-0")]
    first = await heard()
    again = await heard()
    current = [info("decode-0"), info("decode-1")]
    await feed.publish(current)
    changed = await heard()
    current = []
    await feed.publish(current)
    emptied = await heard()
    router.close()
    feed.close()
    context.term()
    assert first.workers == again.workers == [info("decode-0")]
    assert first.version == again.version
    assert [changed.version, emptied.version] == [first.version + 1, first.version + 2]
    assert [len(changed.workers), len(emptied.workers)] == [2, 0]
