"""The life of a release: nothing that somebody else has scaled is reset by it, with either version of Helm."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from deploy.control import ClusterStatus, ConfigurePools, ControlClient, ControlRefused, ControlRequest, ScalePool
from deploy.controller import Controller
from deploy.kube.api import SERVER_ENV, KubeApi, KubeError
from deploy.kube.desired_map import DesiredMap
from deploy.kube.ownership import release_worker_groups
from deploy.rundir import RunDir
from llm_engine.api.config import SECRET_ENV, ClusterConfig, load
from tests.helm.api_server import ApiServer
from tests.helm.charts import CASES, HELMS, NAMESPACE, RELEASE, options
from tests.helm.releases import Autoscaler, Release
from tests.unit.deploy.stand_ins import StandInWorker

SECRET = "test-secret-0123456789"


@pytest.fixture
def api() -> Iterator[ApiServer]:
    with ApiServer() as server:
        yield server


def walk(release: Release, words: list[str]) -> None:
    """Install, change, go back, remove: everything is there when it should be, and nothing is left."""
    release.do("install", *words)
    before = release.specs()
    assert ("RayCluster", RELEASE) in before
    release.do("upgrade", *words, "--set", "image.tag=next")
    image = release.cluster()["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["image"]
    assert image == "baton:next"
    release.do("rollback", "1")
    after = release.specs()
    assert after == before, "a rollback restores what was, the secret included"
    release.do("uninstall")
    assert release.api.names() == set()


@pytest.mark.parametrize("helm", HELMS)
@pytest.mark.parametrize(
    ("hardware", "monitoring", "autoscaling"), [("ascend", True, True), ("gpu", False, True), ("cpu", True, False)]
)
def test_a_release_lives_and_leaves_nothing(
    helm: str, hardware: str, monitoring: bool, autoscaling: bool, api: ApiServer, tmp_path: Path
) -> None:
    walk(Release(helm, api, tmp_path), options(hardware, monitoring, autoscaling))


@pytest.mark.slow
@pytest.mark.parametrize("helm", HELMS)
@pytest.mark.parametrize(("hardware", "monitoring", "autoscaling"), CASES)
def test_every_kind_of_release_lives_and_leaves_nothing(
    helm: str, hardware: str, monitoring: bool, autoscaling: bool, api: ApiServer, tmp_path: Path
) -> None:
    walk(Release(helm, api, tmp_path), options(hardware, monitoring, autoscaling))


@pytest.mark.parametrize("helm", HELMS)
def test_an_upgrade_removes_no_pod_that_the_autoscaler_added(helm: str, api: ApiServer, tmp_path: Path) -> None:
    release, words = Release(helm, api, tmp_path), options("cpu")
    release.do("install", *words)
    autoscaler = Autoscaler(api)
    autoscaler.operate()
    autoscaler.grow("decode", 2)
    assert release.replicas() == {"prefill": 1, "decode": 3}
    release.do("upgrade", *words, "--set", "prefill.maxReplicas=6", "--set", "image.tag=next")
    autoscaler.operate()
    assert len(autoscaler.pods("decode")) == 3
    autoscaler.grow("prefill", 1)
    assert release.replicas() == {"prefill": 2, "decode": 3}, "what Helm does not say is restored from the pods"
    release.do("rollback", "1")
    autoscaler.operate()
    assert [len(autoscaler.pods(pool)) for pool in ("prefill", "decode")] == [2, 3], "no pod came or went"


def test_without_the_hook_helm_4_is_refused_and_nothing_is_changed(api: ApiServer, tmp_path: Path) -> None:
    """The trap that the hook is there for: it is real, and it is loud."""
    release, words = Release(HELMS[-1], api, tmp_path), options("cpu")
    release.do("install", *words)
    autoscaler = Autoscaler(api)
    autoscaler.operate()
    autoscaler.grow("decode", 2)
    done = release.try_("upgrade", *words, "--no-hooks", "--set", "image.tag=next")
    assert done.code != 0
    assert "spec.workerGroupSpecs" in done.err
    assert release.replicas()["decode"] == 3


@pytest.mark.parametrize("helm", HELMS)
def test_another_pool_size_restarts_nothing(helm: str, api: ApiServer, tmp_path: Path) -> None:
    release, words = Release(helm, api, tmp_path), options("gpu")
    release.do("install", *words)
    before = release.specs()
    release.do("upgrade", *words, "--set", "decode.replicas=4")
    after = release.specs()
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    assert changed == {("ConfigMap", "baton-config")}


def test_ownership_is_taken_from_everybody_but_helm(api: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SERVER_ENV, api.url)
    kube = KubeApi()
    assert release_worker_groups(kube, NAMESPACE, RELEASE) == [], "nothing is installed yet"
    key = ("ray.io/v1", "rayclusters", RELEASE)
    group = {"groupName": "decode", "maxReplicas": 4, "minReplicas": 0, "template": {}}
    head = {"template": {"spec": {"containers": [{"name": "ray-head", "image": "x"}]}}}
    spec = {"headGroupSpec": head, "workerGroupSpecs": [group]}
    cluster = {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": {"name": RELEASE}, "spec": spec}
    api.patch(key, cluster, "application/apply-patch+yaml", "helm")
    resize = [{"op": "replace", "path": "/spec/workerGroupSpecs/0/replicas", "value": 3}]
    api.patch(key, resize, "application/json-patch+json", "python-requests")
    api.patch(key, {"metadata": {"labels": {"team": "a"}}}, "application/merge-patch+json", "kubectl-label")
    assert release_worker_groups(kube, NAMESPACE, RELEASE) == ["python-requests"]
    assert release_worker_groups(kube, NAMESPACE, RELEASE) == []
    found = api.get("RayCluster", RELEASE)
    owners = {entry["manager"]: entry["fieldsV1"] for entry in found["metadata"]["managedFields"]}
    assert "python-requests" not in owners
    assert owners["kubectl-label"] == {"f:metadata": {"f:labels": {"f:team": {}}}}
    assert found["spec"]["workerGroupSpecs"][0]["replicas"] == 3, "ownership changed, nothing else"


def configured(release: Release, scratch: Path) -> ClusterConfig:
    """The configuration that the release's pods read, listening on this machine's free ports."""
    file = scratch / "config.toml"
    file.write_text(release.api.get("ConfigMap", f"{RELEASE}-config")["data"]["config.toml"], encoding="utf-8")
    ports = ("controller.host=127.0.0.1", *(f"controller.{name}_port=0" for name in ("feed", "control", "metrics")))
    return load(file, [*ports, "controller.period_s=0.01"]).config


class Head:
    """The controller of a release, as the head pod runs it, with stand-ins for its workers."""

    def __init__(self, config: ClusterConfig, run_dir: Path) -> None:
        self.run_dir = RunDir(run_dir)
        self.run_dir.path.mkdir(exist_ok=True)
        store = DesiredMap(KubeApi(), NAMESPACE, f"{RELEASE}-pools")
        self._controller = Controller(config, self.run_dir, self._worker, None, store)
        self.task = asyncio.create_task(self._controller.run())

    def _worker(self, name: str, revision: int, config: ClusterConfig) -> StandInWorker:
        worker = StandInWorker(name)
        worker.serves()
        return worker

    async def ask(self, request: ControlRequest) -> ClusterStatus:
        def asked() -> ClusterStatus:
            record = self.run_dir.control()
            assert record is not None
            with ControlClient(record.control_addr, SECRET.encode()) as client:
                return client.ask(request)

        async with asyncio.timeout(10.0):
            while self.run_dir.control() is None:
                if self.task.done():
                    self.task.result()
                await asyncio.sleep(0.01)
        return await asyncio.to_thread(asked)

    async def scale(self, pool: str, replicas: int) -> int:
        status = await self.ask(ScalePool(pool=pool, replicas=replicas))
        return status.pools[pool].desired

    async def mount(self, config: ClusterConfig) -> dict[str, int]:
        """What the head does when the mounted file has changed; returns the desired sizes."""
        status = await self.ask(ConfigurePools(pools=config.pools.model_dump(mode="json")))
        return {name: pool.desired for name, pool in status.pools.items()}


@contextlib.asynccontextmanager
async def head(config: ClusterConfig, run_dir: Path) -> AsyncIterator[Head]:
    running = Head(config, run_dir)
    try:
        yield running
    finally:
        running.task.cancel()
        await asyncio.gather(running.task, return_exceptions=True)


@pytest.fixture
def in_cluster(api: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SERVER_ENV, api.url)
    monkeypatch.setenv(SECRET_ENV, SECRET)


@pytest.mark.usefixtures("in_cluster")
@pytest.mark.parametrize("helm", HELMS)
async def test_every_writer_meets_in_one_desired_state(helm: str, api: ApiServer, tmp_path: Path) -> None:
    """`baton scale`, then upgrades that do and do not name a size, then another head pod."""
    release, words = Release(helm, api, tmp_path), options("gpu")

    async def helm_does(*more: str) -> ClusterConfig:
        verb = "upgrade" if api.objects else "install"
        await asyncio.to_thread(release.do, verb, *words, *more)
        return configured(release, tmp_path)

    async with head(await helm_does(), tmp_path / "first") as first:
        assert await first.scale("decode", 3) == 3
        sizes = await first.mount(await helm_does("--set", "prefill.maxReplicas=8"))
        assert sizes == {"prefill": 1, "decode": 3}, "an upgrade that names no size resized a pool"
        sizes = await first.mount(await helm_does("--set", "prefill.maxReplicas=8", "--set", "decode.replicas=4"))
        assert sizes == {"prefill": 1, "decode": 4}, "an upgrade that names a size is an order"
        with pytest.raises(ControlRefused, match="expected 1 to 4"):
            await first.scale("decode", 5)
        assert await first.scale("prefill", 6) == 6
    config = await helm_does("--set", "prefill.maxReplicas=8", "--set", "decode.replicas=4", "--set", "image.tag=x")
    async with head(config, tmp_path / "second") as second:
        sizes = await second.mount(config)
    assert sizes == {"prefill": 6, "decode": 4}, "another head pod has forgotten the sizes"


@pytest.mark.usefixtures("in_cluster")
async def test_a_size_that_can_not_be_kept_is_refused(api: ApiServer, tmp_path: Path) -> None:
    release = Release(HELMS[-1], api, tmp_path)
    await asyncio.to_thread(release.do, "install", *options("cpu"))
    async with head(configured(release, tmp_path), tmp_path / "run") as running:
        assert await running.scale("decode", 2) == 2
        api.delete(("v1", "configmaps", f"{RELEASE}-pools"))
        with pytest.raises(ControlRefused, match="not found"):
            await running.scale("decode", 3)


@pytest.mark.usefixtures("in_cluster")
def test_a_damaged_desired_state_is_not_guessed(api: ApiServer) -> None:
    obj = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "pools"}, "data": {"desired.json": "{"}}
    api.create(("v1", "configmaps", "pools"), obj, "test")
    with pytest.raises(KubeError, match="delete that key"):
        DesiredMap(KubeApi(), NAMESPACE, "pools").desired()


def test_the_stand_in_conflicts_as_server_side_apply_does(api: ApiServer) -> None:
    """The stand-in's own rule, on which the tests above rest."""
    key = ("v1", "configmaps", "c")

    def put(manager: str, **data: str) -> Callable[[], object]:
        obj = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c"}, "data": data}
        return lambda: api.patch(key, obj, "application/apply-patch+yaml", manager)

    put("a", x="1", y="1")()
    put("b", x="1")()  # the same value: shared
    with pytest.raises(Exception, match='conflict with "a"'):
        put("b", x="2")()
    put("a", y="2")()  # x stays: b has it too
    assert api.get("ConfigMap", "c")["data"] == {"x": "1", "y": "2"}
