"""The request plane over real sockets: several routers, strangers, garbage, routers that stop reading."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from llm_engine.api.errors import ConfigError
from llm_engine.api.messages import (
    PROTOCOL_VERSION,
    Cancel,
    Deltas,
    Drain,
    Failed,
    Hello,
    KvEvents,
    Load,
    Role,
    SnapshotRequest,
    Welcome,
    WorkerInfo,
    WorkerMessage,
)
from llm_engine.api.request import TokenDelta
from llm_engine.serving.request_plane import RequestPlane
from tests.unit.worker.recorder import Recorder
from tests.unit.worker.router_client import KEY, RouterClient, submit_of
from tests.unit.worker.waiting import until

INFO = WorkerInfo(
    name="w0",
    role=Role.DECODE,
    incarnation="i0",
    pid=1,
    request_addr="",
    control_addr="",
    metrics_addr="",
    model="m",
    format_id="f",
    weight_version="v",
    block_tokens=16,
    num_blocks=8,
    max_model_len=128,
    max_num_seqs=4,
)


@dataclass
class Served:
    plane: RequestPlane
    worker: Recorder
    rejected: Counter[str]
    address: str


@asynccontextmanager
async def serving(
    *, silence_s: float = 60.0, heartbeat_s: float = 0.02, queue_frames: int = 1000
) -> AsyncIterator[Served]:
    worker, rejected = Recorder(), Counter[str]()
    plane = RequestPlane(
        KEY,
        worker,
        heartbeat_s=heartbeat_s,
        silence_s=silence_s,
        queue_frames=queue_frames,
        on_reject=lambda cause: rejected.update([cause]),
    )
    address = plane.bind("127.0.0.1", 0)
    task = asyncio.create_task(plane.run(INFO))
    try:
        yield Served(plane, worker, rejected, address)
        if task.done():
            task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await asyncio.to_thread(plane.close)


async def test_every_router_is_welcomed_once_and_hears_the_load_again_and_again() -> None:
    async with serving() as served:
        with RouterClient(served.address, "a") as a, RouterClient(served.address, "b") as b:
            assert (await a.hello()).info == INFO
            assert (await b.hello()).info == INFO
            await a.greet()
            for router in (a, b):
                loads = [await router.wait_for(lambda m: isinstance(m, Load)) for _ in range(4)]
                assert [load.seq for load in loads] == sorted({load.seq for load in loads})
            assert not any(isinstance(message, Welcome) for message in a.seen[1:])


async def test_the_load_says_how_many_routers_there_are() -> None:
    def says(count: int) -> Callable[[WorkerMessage], bool]:
        return lambda message: isinstance(message, Load) and message.num_routers == count

    async with serving() as served:
        with RouterClient(served.address, "a") as a:
            await a.hello()
            await a.wait_for(says(1))
            with RouterClient(served.address, "b") as b:
                await b.hello()
                await a.wait_for(says(2))
            await a.wait_for(says(1))


async def test_messages_reach_the_worker_in_order() -> None:
    sent = [submit_of([1, 2, 3]), Cancel(request_id="r", attempt=2), Drain(hand_back=True), SnapshotRequest()]
    async with serving() as served:
        with RouterClient(served.address) as router:
            await router.hello()
            for message in sent:
                await router.send(message)
            await until(lambda: len(served.worker.got) == 4)
            assert served.worker.got == [*sent[:3], "router-0"]


async def test_deltas_and_events_go_where_they_belong() -> None:
    async with serving() as served:
        with RouterClient(served.address, "a") as a, RouterClient(served.address, "b") as b:
            await a.hello()
            await b.hello()
            assert served.plane.send_deltas("a", [TokenDelta(request_id="r", attempt=0, index=0, tokens=[5])])
            served.plane.broadcast(KvEvents(seq=1, stored=[b"x"]))
            await a.wait_for(lambda m: isinstance(m, KvEvents))
            await b.wait_for(lambda m: isinstance(m, KvEvents))
            assert next(m for m in a.seen if isinstance(m, Deltas)).items[0].tokens == [5]
            assert not [m for m in b.seen if isinstance(m, Deltas)]


async def test_nobody_is_served_before_hello() -> None:
    async with serving() as served:
        with RouterClient(served.address) as router:
            await router.send(submit_of([1]))
            await until(lambda: served.rejected["unknown_router"] == 1)
            assert served.worker.got == []
            assert not served.plane.send("router-0", KvEvents(seq=1))


async def test_a_router_cannot_speak_for_another() -> None:
    async with serving() as served:
        with RouterClient(served.address) as router:
            await router.hello()
            await router.send(submit_of([1], router_id="router-1"))
            await until(lambda: served.rejected["malformed"] == 1)
            assert served.worker.got == []


async def test_what_is_not_authentic_or_not_in_the_protocol_is_dropped_and_counted() -> None:
    async with serving() as served:
        with RouterClient(served.address) as router, RouterClient(served.address, "eve", key=b"e" * 32) as eve:
            await router.hello()
            await eve.greet()
            await eve.socket.send(b"")
            await eve.socket.send(b"\x00" * 100)
            await eve.socket.send_multipart([b"one", b"two"])
            await router.send(Load(seq=1))  # authentic, but not a router's message
            genuine = router.codec.encode(Hello(version=1, router_id="x"))
            await router.socket.send(genuine[:-1] + bytes([genuine[-1] ^ 1]))
            await until(lambda: served.rejected["malformed"] == 6)
            assert not served.plane.knows("eve")
            await router.send(submit_of([1]))
            await until(lambda: len(served.worker.got) == 1)


async def test_another_protocol_version_is_answered_but_not_served() -> None:
    async with serving() as served:
        with RouterClient(served.address) as router:
            await router.greet(version=99)
            welcome = await router.wait_for(lambda m: isinstance(m, Welcome))
            assert isinstance(welcome, Welcome)
            assert welcome.version == PROTOCOL_VERSION
            assert served.rejected["version"] == 1
            assert not served.plane.knows("router-0")


async def test_a_silent_router_is_forgotten_and_hears_of_its_streams_when_it_is_back() -> None:
    failure = Failed(request_id="r", attempt=3, code="router", reason="lost", retryable=True)
    async with serving(silence_s=0.1) as served:
        served.worker.when_lost = lambda router_id: served.plane.send(router_id, failure)
        with RouterClient(served.address, "quiet") as quiet, RouterClient(served.address, "alive") as alive:
            await quiet.hello()
            await alive.hello()
            async with asyncio.timeout(10.0):
                while not served.worker.lost:
                    await alive.greet()
                    await asyncio.sleep(0.01)
            assert served.worker.lost == ["quiet"]
            assert not served.plane.knows("quiet")
            await quiet.hello()
            assert await quiet.wait_for(lambda m: isinstance(m, Failed)) == failure


async def test_a_pause_of_the_worker_is_not_a_silence_of_its_routers() -> None:
    async with serving(silence_s=0.3, heartbeat_s=0.05) as served:
        with RouterClient(served.address) as router:
            await router.hello()
            time.sleep(1.0)  # noqa: ASYNC251 - the whole process stands still
            loads = served.worker.loads
            await router.greet()
            await until(lambda: served.worker.loads >= loads + 2)
            assert served.worker.lost == []
            assert served.plane.knows("router-0")


async def test_a_router_that_does_not_read_is_dropped_without_waiting_and_without_harm_to_others() -> None:
    bulk = KvEvents(seq=1, stored=[bytes(16)] * 4000)
    async with serving(heartbeat_s=0.5, queue_frames=8) as served:
        with (
            RouterClient(served.address, "slow", receive_queue=1) as slow,
            RouterClient(served.address, "fast") as fast,
        ):
            await slow.hello()
            await fast.hello()
            sent = 0
            started = time.monotonic()
            while served.plane.send("slow", bulk):
                sent += 1
                assert sent < 1000, "the queue towards a router that does not read has no bound"
            assert time.monotonic() - started < 5.0
            assert served.worker.lost == ["slow"]
            failure = Failed(request_id="r", attempt=0, code="router", reason="slow", retryable=True)
            assert not served.plane.send("slow", failure)
            assert served.plane.send("fast", KvEvents(seq=7))
            await fast.wait_for(lambda m: isinstance(m, KvEvents) and m.seq == 7)
            async with asyncio.timeout(10.0):
                while failure not in slow.seen:  # as a router does: Hello every heartbeat, reading all the time
                    await slow.greet()
                    await slow.receive()


async def test_a_router_that_is_gone_is_noticed_at_the_first_message() -> None:
    async with serving() as served:
        router = RouterClient(served.address)
        await router.hello()
        router.close()
        await until(lambda: not served.plane.send("router-0", KvEvents(seq=1)))
        assert served.worker.lost == ["router-0"]


async def test_a_router_on_a_new_connection_loses_the_streams_of_the_old_one() -> None:
    async with serving() as served:
        with RouterClient(served.address) as old:
            await old.hello()
            with RouterClient(served.address, identity="elsewhere") as new:
                await new.hello()
                await until(lambda: served.worker.lost == ["router-0"])
                assert served.plane.knows("router-0")


def test_a_taken_port_is_one_clear_error() -> None:
    first, second = (RequestPlane(KEY, Recorder(), heartbeat_s=1, silence_s=1) for _ in range(2))
    try:
        port = int(first.bind("127.0.0.1", 0).rsplit(":", 1)[1])
        with pytest.raises(ConfigError, match=rf"worker\.request_port={port}: can't listen"):
            second.bind("127.0.0.1", port)
    finally:
        first.close()
        second.close()
