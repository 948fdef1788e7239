from __future__ import annotations

import asyncio
import http.server
import threading
import tomllib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
import zmq
import zmq.asyncio

from deploy.control import (
    ClusterStatus,
    ConfigurePools,
    ControlClient,
    ControlRefused,
    ControlRequest,
    DrainWorker,
    GetStatus,
    RollOut,
    ScalePool,
    StopCluster,
)
from deploy.controller import Controller
from deploy.rundir import RunDir
from llm_engine.api.config import SECRET_ENV, ClusterConfig, PoolConfig, load
from llm_engine.api.errors import ServingError
from llm_engine.api.messages import Codec, Members
from tests.unit.deploy.stand_ins import StandInRouter, StandInWorker, config

SECRET = "test-secret-0123456789"


class Answering(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/ready" else 404)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def ready_port() -> Iterator[int]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answering)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


class Site:
    """A controller with stand-ins in place of Ray's actors."""

    def __init__(self, run_dir: Path, port: int) -> None:
        self.run_dir = RunDir(run_dir)
        self.workers: dict[str, StandInWorker] = {}
        self.configs: dict[str, ClusterConfig] = {}
        self.revisions: dict[str, int] = {}
        self.routers: list[StandInRouter] = []
        self._port = port
        self.begin()

    def begin(self, existing: Mapping[str, int] = MappingProxyType({})) -> None:
        known = load(self.run_dir.config).config if self.run_dir.control() else config()
        controller = Controller(known, self.run_dir, self._worker, self._router)
        self.task = asyncio.create_task(controller.run(existing))

    async def kill(self) -> None:
        """The controller's process is gone: nothing is said, nothing written."""
        self.task.cancel()
        await asyncio.wait({self.task})

    async def ask(self, request: ControlRequest) -> ClusterStatus:
        def asked() -> ClusterStatus:
            record = self.run_dir.control()
            assert record is not None
            with ControlClient(record.control_addr, SECRET.encode()) as client:
                return client.ask(request, timeout_s=5.0)

        return await asyncio.to_thread(asked)

    async def until(self, condition: Callable[[ClusterStatus], bool]) -> ClusterStatus:
        async with asyncio.timeout(10.0):
            while True:
                if self.task.done():
                    await self.task
                if self.run_dir.control() is not None and condition(status := await self.ask(GetStatus())):
                    return status
                await asyncio.wait({self.task}, timeout=0.01)

    def _worker(self, name: str, revision: int, config: ClusterConfig) -> StandInWorker:
        worker = self.workers.get(name)
        if worker is None or worker.run().done():
            worker = self.workers[name] = StandInWorker(name)
        self.configs[name], self.revisions[name] = config, revision
        worker.serves()
        return worker

    def _router(self) -> StandInRouter:
        self.routers.append(StandInRouter(self._port))
        return self.routers[-1]


@pytest.fixture
async def site(tmp_path: Path, ready_port: int, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Site]:
    monkeypatch.setenv(SECRET_ENV, SECRET)
    site = Site(tmp_path, ready_port)
    yield site
    await site.kill()


async def test_a_cluster_comes_up_as_configured(site: Site) -> None:
    status = await site.until(lambda now: now.ready)
    assert [worker.name for worker in status.workers] == ["decode-0", "prefill-0"]
    assert {name: (pool.desired, pool.ready) for name, pool in status.pools.items()} == {
        "prefill": (1, 1),
        "decode": (1, 1),
    }


async def test_every_process_gets_the_same_resolved_configuration(site: Site) -> None:
    await site.until(lambda now: now.ready)
    control = site.run_dir.control()
    assert control is not None
    written = load(site.run_dir.config).config
    assert written.router.membership == control.feed_addr
    assert written == config().model_copy(update={"router": written.router})
    assert SECRET not in str(tomllib.loads(site.run_dir.config.read_text(encoding="utf-8")))


async def test_routers_are_told_the_members(site: Site) -> None:
    await site.until(lambda now: now.ready)
    control = site.run_dir.control()
    assert control is not None
    context = zmq.asyncio.Context()
    router = context.socket(zmq.SUB)
    router.linger = 0
    router.subscribe(b"")
    router.connect(control.feed_addr)
    codec: Codec[Members] = Codec(SECRET.encode(), Members)
    async with asyncio.timeout(10.0):
        members = codec.decode(await router.recv())
        await site.ask(ScalePool(pool="decode", replicas=3))
        while len((later := codec.decode(await router.recv())).workers) < 4:
            assert later.version >= members.version
    router.close()
    context.term()
    assert {worker.name for worker in members.workers} == {"prefill-0", "decode-0"}
    assert {worker.name for worker in later.workers} == {"prefill-0", "decode-0", "decode-1", "decode-2"}


async def test_pools_scale_up_and_down_and_the_size_is_kept(site: Site) -> None:
    await site.until(lambda now: now.ready)
    await site.ask(ScalePool(pool="decode", replicas=3))
    await site.until(lambda now: now.ready and now.pools["decode"].ready == 3)
    await site.ask(ScalePool(pool="decode", replicas=1))
    status = await site.until(lambda now: len(now.workers) == 2)
    assert [worker.name for worker in status.workers] == ["decode-0", "prefill-0"]
    assert site.workers["decode-2"].stopped_with == [5.0]
    stored = site.run_dir.desired()
    assert stored is not None
    assert stored.replicas == {"prefill": 1, "decode": 1, "aggregated": 0}


async def test_a_changed_configuration_is_an_order_and_an_unchanged_one_is_not(site: Site) -> None:
    await site.until(lambda now: now.ready)
    await site.ask(ScalePool(pool="decode", replicas=2))
    await site.ask(ConfigurePools(pools={"decode": {"replicas": 1, "max_replicas": 3}}))
    assert (await site.until(lambda now: now.ready)).pools["decode"].desired == 2
    await site.ask(ConfigurePools(pools={"decode": {"replicas": 3, "max_replicas": 3}}))
    assert (await site.until(lambda now: now.ready)).pools["decode"].ready == 3
    with pytest.raises(ControlRefused, match="expected 0 to 3"):
        await site.ask(ScalePool(pool="decode", replicas=4))
    with pytest.raises(ControlRefused, match="min_replicas <= replicas"):
        await site.ask(ConfigurePools(pools={"decode": {"replicas": 9, "max_replicas": 3}}))


async def test_a_drained_worker_is_replaced(site: Site) -> None:
    await site.until(lambda now: now.ready)
    await site.ask(DrainWorker(worker="decode-0"))
    status = await site.until(lambda now: now.ready and all(w.name != "decode-0" for w in now.workers))
    assert [worker.name for worker in status.workers] == ["decode-1", "prefill-0"]


async def test_a_rollout_replaces_every_worker_and_only_their_configuration(site: Site) -> None:
    await site.until(lambda now: now.ready)
    await site.ask(ScalePool(pool="decode", replicas=2))
    before = await site.until(lambda now: now.ready and len(now.workers) == 3)
    new = config(drain_timeout_s=7.0)
    new = new.model_copy(update={"pools": new.pools.model_copy(update={"prefill": PoolConfig(replicas=9)})})
    assert (await site.ask(RollOut(config=new.model_dump_json()))).revision == 1
    after = await site.until(lambda now: now.ready and [worker.revision for worker in now.workers] == [1, 1, 1])
    assert {worker.pid for worker in after.workers}.isdisjoint(worker.pid for worker in before.workers)
    assert {pool: status.desired for pool, status in after.pools.items()} == {"prefill": 1, "decode": 2}
    assert {site.configs[worker.name].worker.drain_timeout_s for worker in after.workers} == {7.0}
    assert load(site.run_dir.config).config.worker.drain_timeout_s == 7.0, "a restarted controller goes on with it"


async def test_a_rollout_to_another_model_name_is_refused(site: Site) -> None:
    await site.until(lambda now: now.ready)
    other = config().model_copy(update={"model": config().model.model_copy(update={"name": "other"})})
    with pytest.raises(ControlRefused, match="keeps that name"):
        await site.ask(RollOut(config=other.model_dump_json()))
    assert {worker.revision for worker in (await site.ask(GetStatus())).workers} == {0}


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (DrainWorker(worker="decode-9"), "no worker is called 'decode-9'"),
        (ScalePool(pool="encode", replicas=1), "pool 'encode'"),
        (ScalePool(pool="decode", replicas=5000), "replicas=5000"),
    ],
)
async def test_what_can_not_be_done_is_refused(site: Site, request_: ControlRequest, reason: str) -> None:
    await site.until(lambda now: now.ready)
    with pytest.raises(ControlRefused, match=reason):
        await site.ask(request_)
    assert (await site.ask(GetStatus())).ready


async def test_a_failed_router_is_started_again(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.controller.RESTART_PAUSE_S", (0.05,))
    await site.until(lambda now: now.ready)
    site.routers[0].fail(ServingError("the router does not start: port taken"))
    status = await site.until(lambda now: not now.router.ready)
    assert status.router.error == "the router does not start: port taken"
    assert not status.ready
    await site.until(lambda now: now.ready)
    assert len(site.routers) == 2


async def test_a_restarted_controller_takes_over_what_runs(site: Site) -> None:
    await site.until(lambda now: now.ready)
    await site.ask(ScalePool(pool="decode", replicas=2))
    await site.until(lambda now: now.ready and now.pools["decode"].ready == 2)
    await site.ask(DrainWorker(worker="decode-0"))
    names = ["decode-1", "decode-2", "prefill-0"]
    await site.until(lambda now: now.ready and [worker.name for worker in now.workers] == names)
    before, pids = site.run_dir.control(), {name: site.workers[name].pid for name in names}
    await site.kill()
    site.begin(existing=dict.fromkeys(names, 0))
    status = await site.until(lambda now: now.ready)
    assert site.run_dir.control() == before, "routers and the command line know the old addresses"
    assert {worker.name: worker.pid for worker in status.workers} == pids
    assert not any(site.workers[name].killed for name in names)


async def test_a_restarted_controller_goes_on_with_a_rollout(site: Site) -> None:
    await site.until(lambda now: now.ready)
    await site.ask(ScalePool(pool="decode", replicas=2))
    before = await site.until(lambda now: now.ready and len(now.workers) == 3)
    for worker in site.workers.values():
        worker.busy = True  # it drains for as long as the test wants
    await site.ask(RollOut(config=config(drain_timeout_s=7.0).model_dump_json()))
    half = await site.until(lambda now: any(worker.state == "draining" for worker in now.workers))
    assert {worker.revision for worker in half.workers} == {0, 1}
    living = {worker.name: worker.revision for worker in half.workers}
    await site.kill()
    site.begin(existing=living)
    status = await site.until(lambda now: any(worker.state == "draining" for worker in now.workers))
    assert living.items() <= {worker.name: worker.revision for worker in status.workers}.items()
    assert status.revision == 1
    leaving = [worker.name for worker in status.workers if worker.state == "draining"]
    assert leaving == [worker.name for worker in half.workers if worker.state == "draining"], "the one that drained"
    for name in (worker.name for worker in before.workers):
        site.workers[name].busy = False
        site.workers[name].finish_if_stopped()
    after = await site.until(lambda now: now.ready and {worker.revision for worker in now.workers} == {1})
    assert len(after.workers) == 3
    new = {name for name, revision in site.revisions.items() if revision == 1}
    assert not any(site.workers[name].stopped_with for name in new), "a new worker was taken for a surplus one"
    assert {site.configs[name].worker.drain_timeout_s for name in new} == {7.0}


async def test_settings_that_changed_while_no_controller_ran_are_rolled_out(site: Site) -> None:
    await site.until(lambda now: now.ready)
    await site.kill()
    site.run_dir.config.write_text(
        site.run_dir.config.read_text(encoding="utf-8").replace("drain_timeout_s = 5.0", "drain_timeout_s = 6.0"),
        encoding="utf-8",
    )
    site.begin(existing={"prefill-0": 0, "decode-0": 0})
    status = await site.until(lambda now: now.ready and {worker.revision for worker in now.workers} == {1})
    assert {site.configs[worker.name].worker.drain_timeout_s for worker in status.workers} == {6.0}
    await site.kill()
    site.begin(existing={worker.name: 1 for worker in status.workers})
    assert (await site.until(lambda now: now.ready)).revision == 1, "nothing has changed since"


async def test_stop_ends_the_router_first_and_then_the_workers(site: Site) -> None:
    await site.until(lambda now: now.ready)
    await site.ask(StopCluster())
    async with asyncio.timeout(10.0):
        await site.task
    assert site.routers[0].stopped
    assert {tuple(worker.stopped_with) for worker in site.workers.values()} == {(0.0,)}
