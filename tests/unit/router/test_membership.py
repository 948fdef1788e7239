"""Who lives, who is lost, who comes back: with real sockets, and with the controller's feed."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator

import msgspec
import pytest
import zmq

from benchmarks.fake_settings import FakeSettings
from benchmarks.fake_worker import FakeWorker
from llm_engine.api.messages import Cancel, Codec, Drain, Members, Role, SnapshotRequest, WorkerInfo
from router.dispatcher import ClusterDispatcher
from router.worker import LinkState, Worker
from tests.unit.router.router_cluster import KEY, check, collect, dispatching, fakes, request, until

PROMPT = list(range(40))


def seen(dispatcher: ClusterDispatcher, name: str) -> Worker:
    worker = dispatcher.membership.find(name)
    assert worker is not None
    return worker


async def test_a_silent_worker_is_lost_and_comes_back() -> None:
    with fakes("prefill", "decode") as workers:
        async with dispatching([w.info.request_addr for w in workers], heartbeat_timeout_s=0.3) as dispatcher:
            decode = seen(dispatcher, "decode-1")
            workers[1].settings.muted = True
            await until(lambda: decode.state is LinkState.LOST)
            assert not dispatcher.ready()
            workers[1].settings.muted = False
            await until(lambda: decode.state is LinkState.ALIVE)
            assert dispatcher.ready()
            await check(dispatcher, request(PROMPT))


async def test_a_worker_that_comes_back_is_told_to_cancel_its_old_attempts() -> None:
    with fakes("prefill", "decode", "decode", step_s=0.01) as workers:
        async with dispatching([w.info.request_addr for w in workers], heartbeat_timeout_s=0.3) as dispatcher:
            running = asyncio.create_task(check(dispatcher, request(PROMPT, 150)))
            first = workers[1]
            await until(lambda: first._running)
            first.settings.muted = True
            await until(lambda: workers[2]._running)  # recovered there
            first.log.clear()
            first.settings.muted = False
            await until(lambda: any(isinstance(m, Cancel) and m.attempt == 1 for m in first.log))
            await until(lambda: not first._running)
            assert not running.done()
            await running


async def test_a_restarted_worker_is_a_new_one_at_the_old_address() -> None:
    with fakes("prefill", "decode") as workers:
        async with dispatching([w.info.request_addr for w in workers], heartbeat_timeout_s=30.0) as dispatcher:
            decode = seen(dispatcher, "decode-1")
            old = decode.info
            running = asyncio.create_task(check(dispatcher, request(PROMPT, 100)))
            await until(lambda: workers[1]._running)
            workers[1].stop()
            await until(lambda: decode.state is LinkState.LOST)  # by the broken connection, not by silence
            port = int(workers[1].info.request_addr.rpartition(":")[2])
            again = FakeWorker(FakeSettings(name="decode-1", role=Role.DECODE, port=port), KEY)
            again.start()
            try:
                await until(lambda: decode.info is not old and decode.usable)
                await asyncio.wait_for(running, 10)
                assert not any(isinstance(m, Cancel) for m in again.log), "the attempts died with the old one"
            finally:
                again.stop()


async def test_workers_of_another_model_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    with fakes("prefill", "decode", model="other") as workers:
        async with dispatching([w.info.request_addr for w in workers], workers=0) as dispatcher:
            await until(lambda: all(w.state is LinkState.REFUSED for w in dispatcher.membership.workers))
            assert not dispatcher.ready()
            assert "model 'other'" in caplog.text


async def test_incompatible_workers_are_named_and_not_paired(caplog: pytest.LogCaptureFixture) -> None:
    with fakes("prefill") as prefills, fakes("decode", format_id="g") as decodes:
        addresses = [prefills[0].info.request_addr, decodes[0].info.request_addr]
        async with dispatching(addresses) as dispatcher:
            assert not dispatcher.ready()
            error = next(r for r in caplog.records if r.levelno == logging.ERROR).getMessage()
            assert "prefill-0" in error
            assert "decode-0" in error
            assert "format_id" in error


async def test_a_draining_worker_gets_no_new_work() -> None:
    with fakes("prefill", "decode", "decode") as workers:
        async with dispatching([w.info.request_addr for w in workers]) as dispatcher:
            assert not dispatcher.drain("nobody")
            assert dispatcher.drain("decode-1")
            assert not seen(dispatcher, "decode-1").usable, "before it says so itself"
            await asyncio.gather(*(check(dispatcher, request([i] * 20)) for i in range(8)))
            assert not workers[1]._cache
            assert any(isinstance(m, Drain) for m in workers[1].log)
            await until(lambda: seen(dispatcher, "decode-1").load.draining)


async def test_an_unhealthy_worker_loses_its_requests_and_gets_no_new_ones() -> None:
    with fakes("prefill", "decode", "decode") as workers:
        async with dispatching([w.info.request_addr for w in workers]) as dispatcher:
            running = asyncio.create_task(check(dispatcher, request(PROMPT, 200)))
            await until(lambda: workers[1]._running)
            workers[1].settings.healthy = False
            await until(lambda: workers[2]._running)
            await until(lambda: not workers[1]._running)
            blocks = len(workers[1]._cache)
            await asyncio.gather(*(check(dispatcher, request([i] * 20)) for i in range(8)))
            assert len(workers[1]._cache) == blocks
            await running


async def test_a_new_incarnation_on_the_old_connection_is_a_loss() -> None:
    with fakes("prefill", "decode", step_s=0.01) as workers:
        async with dispatching([w.info.request_addr for w in workers]) as dispatcher:
            running = asyncio.create_task(check(dispatcher, request(PROMPT, 60)))
            decode = workers[1]
            await until(lambda: decode._running)
            decode.info = msgspec.structs.replace(decode.info, incarnation="another")
            decode._running.clear()
            decode._routers.clear()
            await running
            assert b'cause="decode_restarted"' in dispatcher.metrics.render()


async def test_missed_kv_events_are_repaired_by_a_snapshot() -> None:
    with fakes("prefill", "decode") as workers:
        async with dispatching([w.info.request_addr for w in workers]) as dispatcher:
            prefill = seen(dispatcher, "prefill-0")
            await until(lambda: prefill.prefix.in_step)
            assert (await check(dispatcher, request(PROMPT))).cached_tokens == 0
            await until(lambda: len(prefill.prefix) == 2)
            workers[0].settings.swallow_kv_events, workers[0].settings.swallow_snapshots = 1, 1
            await check(dispatcher, request([7] * 48))
            began = time.monotonic()
            await check(dispatcher, request([8] * 48))
            await until(lambda: len(prefill.prefix) == 8)
            assert time.monotonic() - began > 0.8, "a worker is asked once a second at most"
            assert prefill.prefix.num_gaps == 1
            asked = [m for m in workers[0].log if isinstance(m, SnapshotRequest)]
            assert len(asked) == 3  # when it joined, after the gap, and once more a second later


async def test_a_warm_worker_tells_what_it_holds_when_a_router_joins() -> None:
    with fakes("prefill", "decode") as workers:
        addresses = [w.info.request_addr for w in workers]
        async with dispatching(addresses) as dispatcher:
            await check(dispatcher, request(PROMPT))
        async with dispatching(addresses) as dispatcher:
            await until(lambda: len(seen(dispatcher, "prefill-0").prefix) == 2)


class Feed:
    """The controller's publisher."""

    def __init__(self, port: int = 0) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.PUB)
        self._socket.bind(f"tcp://127.0.0.1:{port or '*'}")
        self._codec: Codec[Members] = Codec(KEY, Members)
        self._version = 0
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def publish(self, *workers: WorkerInfo) -> None:
        self._version += 1
        self._socket.send(self._codec.encode(Members(version=self._version, workers=list(workers))))

    def close(self) -> None:
        self._context.destroy(linger=0)


@pytest.fixture
def feed() -> Iterator[Feed]:
    feed = Feed()
    yield feed
    feed.close()


async def publish_until(feed: Feed, dispatcher: ClusterDispatcher, *workers: WorkerInfo, ready: bool = True) -> None:
    async with asyncio.timeout(10):
        while dispatcher.ready() is not ready:
            feed.publish(*workers)
            await asyncio.sleep(0.02)


async def test_the_feed_names_the_workers_and_its_silence_changes_nothing(feed: Feed) -> None:
    with fakes("prefill", "decode") as workers:
        infos = [w.info for w in workers]
        async with dispatching([], workers=0, membership=feed.address, heartbeat_timeout_s=0.3) as dispatcher:
            await publish_until(feed, dispatcher, *infos)
            feed.close()
            await asyncio.sleep(0.6)
            assert dispatcher.ready()
            await check(dispatcher, request(PROMPT))


async def test_a_worker_that_leaves_the_feed_ends_its_requests_and_gets_no_new_ones(feed: Feed) -> None:
    with fakes("prefill", "decode", "decode") as workers:
        infos = [w.info for w in workers]
        async with dispatching([], workers=0, membership=feed.address) as dispatcher:
            await publish_until(feed, dispatcher, *infos[:2])
            running = asyncio.create_task(collect(dispatcher, request(PROMPT, 60)))
            await until(lambda: workers[1]._running)
            version = dispatcher.membership.feed_version
            feed.publish(infos[0], infos[2])
            await until(lambda: dispatcher.membership.feed_version != version)
            await until(lambda: any(w.usable and w.name == "decode-2" for w in dispatcher.membership.workers))
            await check(dispatcher, request([9] * 20, 4))
            assert not workers[2]._running
            assert workers[1]._running, "the running request stays where it is"
            assert len((await running).tokens) == 60
            assert dispatcher.status()["recent"][0]["attempts"][0]["decode"] == "decode-1"
            await until(lambda: dispatcher.membership.find("decode-1") is None)


async def test_a_replaced_incarnation_is_lost_before_its_silence_is_noticed(feed: Feed) -> None:
    with fakes("prefill", "decode") as workers:
        infos = [w.info for w in workers]
        async with dispatching([], workers=0, membership=feed.address, heartbeat_timeout_s=30.0) as dispatcher:
            await publish_until(feed, dispatcher, *infos)
            running = asyncio.create_task(check(dispatcher, request(PROMPT, 100)))
            await until(lambda: workers[1]._running)
            workers[1].settings.muted = True
            with fakes("decode") as replacements:
                replacements[0].info = replacement = _renamed(replacements[0].info, infos[1].name)
                feed.publish(infos[0], replacement)
                await asyncio.wait_for(running, 10)
                assert replacements[0].log


def _renamed(info: WorkerInfo, name: str) -> WorkerInfo:
    return msgspec.structs.replace(info, name=name)
