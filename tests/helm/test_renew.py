"""The head pod over upgrades: replaced by a hook where that interrupts nothing, and left alone where it would."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.kube.api import SERVER_ENV, KubeApi
from deploy.kube.renew import KIND, NotRenewed, renew_head
from tests.helm.api_server import ApiServer
from tests.helm.charts import CASES, HELMS, NAMESPACE, RELEASE, VALUES, Manifest, only, options, rendered
from tests.helm.releases import Release

FAULT_TOLERANT = ("ray.gcsFaultTolerance.redisAddress=redis:6379",)
HEAD = {"ray.io/cluster": RELEASE, "ray.io/node-type": "head"}


def head_kind(hardware: str = "ascend", *sets: str) -> str:
    cluster = only(rendered(hardware, False, True, *sets), "RayCluster")
    kind: str = cluster["spec"]["headGroupSpec"]["template"]["metadata"]["annotations"][KIND]
    return kind


class Operator(threading.Thread):
    """KubeRay, as far as head pods go: there is always one, made from the template of that moment."""

    def __init__(self, api: ApiServer) -> None:
        super().__init__()
        self.api = api
        self.made: list[str] = []  # images
        self.over = threading.Event()

    def heads(self) -> list[Manifest]:
        return self.api.listing("v1", "pods", HEAD, "")[0]

    def run(self) -> None:
        while not self.over.wait(0.05):
            clusters, _ = self.api.listing("ray.io/v1", "rayclusters", {}, RELEASE)
            if clusters and not self.heads():
                self._make(clusters[0]["spec"]["headGroupSpec"]["template"])

    def _make(self, template: Manifest) -> None:
        name = f"{RELEASE}-head-{len(self.made)}"
        metadata = {"name": name, "namespace": NAMESPACE, "labels": HEAD}
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {**metadata, "annotations": template["metadata"]["annotations"]},
            "spec": template["spec"],
            "status": {"conditions": [{"type": "Ready", "status": "True"}]},
        }
        self.api.create(("v1", "pods", name), pod, "kuberay-operator")
        self.made.append(template["spec"]["containers"][0]["image"])


@pytest.fixture
def operator() -> Iterator[Operator]:
    with ApiServer() as api:
        operator = Operator(api)
        operator.start()
        yield operator
        operator.over.set()
        operator.join()


@pytest.mark.parametrize("helm", HELMS)
def test_an_upgrade_brings_another_head_where_workers_outlive_it(helm: str, operator: Operator, tmp_path: Path) -> None:
    release = Release(helm, operator.api, tmp_path)
    words = options("cpu", False, True, *FAULT_TOLERANT)
    release.do("install", *words)
    release.do("upgrade", *words, "--set", "image.tag=next")
    assert operator.made == ["baton:0.1.0-cpu", "baton:next"]
    release.do("upgrade", *words, "--set", "image.tag=next", "--set", "decode.replicas=2")
    assert len(operator.made) == 2, "nothing of the head has changed"
    release.do("rollback", "1")
    assert operator.made[2:] == ["baton:0.1.0-cpu"]
    assert len(operator.heads()) == 1
    done = [(code, said.strip()) for name, code, said in operator.api.jobs if name.endswith("-renew")]
    assert [code for code, _ in done] == [0, 0, 0]
    assert ["another" in said for _, said in done] == [True, False, True], done


@pytest.mark.parametrize("helm", HELMS)
def test_without_fault_tolerance_the_head_stays_and_the_release_says_so(
    helm: str, operator: Operator, tmp_path: Path
) -> None:
    release, words = Release(helm, operator.api, tmp_path), options("cpu")
    assert "head pod stays" not in release.do("install", *words)
    said = release.do("upgrade", *words, "--set", "image.tag=next")
    assert "delete pod -l ray.io/cluster=baton,ray.io/node-type=head" in said
    assert len(operator.made) <= 1


def test_a_head_that_does_not_get_ready_is_an_error_of_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with ApiServer() as api:
        monkeypatch.setenv(SERVER_ENV, api.url)
        template = {"metadata": {"annotations": {KIND: "new"}}, "spec": {"containers": [{"name": "h", "image": "x"}]}}
        spec = {"headGroupSpec": {"template": template, "rayStartParams": {}}, "workerGroupSpecs": []}
        cluster = {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": {"name": RELEASE}, "spec": spec}
        api.create(("ray.io/v1", "rayclusters", RELEASE), cluster, "helm")
        with pytest.raises(NotRenewed, match="no head pod of the new kind is ready within 0 s"):
            renew_head(KubeApi(), NAMESPACE, RELEASE, 0.0)


@pytest.mark.parametrize(("hardware", "monitoring", "autoscaling"), CASES)
def test_the_operator_never_recreates_the_whole_cluster(hardware: str, monitoring: bool, autoscaling: bool) -> None:
    assert "upgradeStrategy" not in only(rendered(hardware, monitoring, autoscaling), "RayCluster")["spec"]


@pytest.mark.parametrize("hardware", VALUES)
def test_the_heads_kind_follows_what_takes_effect_at_its_start(hardware: str) -> None:
    same = head_kind(hardware)
    for changed in ("image.tag=x", "autoscaling.mode=act", "security.revision=b", "controller.ports.feed=7011"):
        assert head_kind(hardware, changed) != same, changed
    for unchanged in ("decode.replicas=2", "router.replicas=3", "decode.maxReplicas=9", "monitoring.interval=9s"):
        assert head_kind(hardware, unchanged) == same, unchanged
