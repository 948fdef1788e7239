"""What the chart renders: valid objects, a configuration that Baton loads, the same from both versions of Helm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from llm_engine.api.config import load
from tests.helm import kinds
from tests.helm.charts import (
    CASES,
    CHART,
    HELMS,
    NAMESPACE,
    VALUES,
    Manifest,
    config_text,
    config_tree,
    groups,
    only,
    options,
    pod_specs,
    ray_resource,
    refusal,
    rendered,
    run,
    template,
    tool,
)

EVERYTHING = (
    "router.ingress.enabled=true",
    "router.ingress.host=llm.example.com",
    "router.ingress.tlsSecretName=tls",
    "router.gateway.enabled=true",
    "router.gateway.parentRefs[0].name=gateway",
    "security.tenantsSecret=tenants",
    "tests.apiKeySecret=tenant",
    "decode.minReplicas=2",
    "decode.replicas=3",
    "aggregated.maxReplicas=2",
    "autoscaling.mode=act",
    "autoscaling.maxCards=64",
    "model.maxLen=65536",
    "ray.gcsFaultTolerance.redisAddress=redis:6379",
)
ASCEND_AGGREGATED = "aggregated.cards=8"


@pytest.mark.parametrize("helm", HELMS)
@pytest.mark.parametrize(("hardware", "monitoring", "autoscaling"), CASES)
def test_every_object_is_valid(helm: str, hardware: str, monitoring: bool, autoscaling: bool) -> None:
    docs = rendered(hardware, monitoring, autoscaling, helm=helm)
    for doc in docs:
        kinds.check(doc)
    names = [(doc["kind"], doc["metadata"]["name"]) for doc in docs]
    assert len(set(names)) == len(names)
    assert ("PrometheusRule" in {kind for kind, _ in names}) is monitoring
    lint = run(tool(helm), "lint", "--strict", str(CHART), *options(hardware, monitoring, autoscaling))
    assert lint.code == 0, lint.out


@pytest.mark.parametrize("helm", HELMS)
@pytest.mark.parametrize("hardware", VALUES)
def test_every_option_at_once_is_valid(helm: str, hardware: str) -> None:
    cards = () if hardware == "cpu" else (ASCEND_AGGREGATED,)
    docs = rendered(hardware, True, True, *EVERYTHING, *cards, helm=helm)
    for doc in docs:
        kinds.check(doc)
    assert {"Ingress", "HTTPRoute"} <= {doc["kind"] for doc in docs}
    paths = [path["path"] for rule in only(docs, "Ingress")["spec"]["rules"] for path in rule["http"]["paths"]]
    assert paths == ["/v1"], "only the API is for the outside"


def test_an_unknown_field_would_be_noticed() -> None:
    doc = yaml.safe_load(yaml.safe_dump(only(rendered("cpu"), "RayCluster")))
    doc["spec"]["workerGroupSpecs"][0]["groupname"] = "x"
    with pytest.raises(jsonschema.ValidationError, match="groupname"):
        kinds.check(doc)


@pytest.mark.parametrize(("hardware", "monitoring", "autoscaling"), CASES)
def test_both_versions_of_helm_render_the_same(hardware: str, monitoring: bool, autoscaling: bool) -> None:
    def objects(helm: str) -> dict[tuple[str, str], Manifest]:
        docs = rendered(hardware, monitoring, autoscaling, "security.existingSecret=key", helm=helm)
        return {(d["kind"], d["metadata"]["name"]): d for d in docs if not d["metadata"]["name"].endswith("-release")}

    assert objects(HELMS[0]) == objects(HELMS[1])


@pytest.mark.parametrize("helm", HELMS)
@pytest.mark.parametrize("hardware", VALUES)
@pytest.mark.parametrize("sets", [(), EVERYTHING], ids=["plain", "everything"])
def test_baton_loads_the_configuration(helm: str, hardware: str, sets: tuple[str, ...], tmp_path: Path) -> None:
    """Every line that the chart writes is a key of Baton with a value in its range."""
    cards = (ASCEND_AGGREGATED,) if sets and hardware != "cpu" else ()
    docs = rendered(hardware, False, True, *sets, *cards, helm=helm)
    file = tmp_path / "config.toml"
    file.write_text(config_text(docs), encoding="utf-8")
    config = load(file).config
    assert config.engine.backend == {"cpu": "cpu", "gpu": "triton", "ascend": "npu"}[hardware]
    assert str(config.model.path) == "/models/checkpoint"
    for name, group in groups(docs).items():
        pool = getattr(config.pools, name)
        container = group["template"]["spec"]["containers"][0]
        limits = container["resources"]["limits"]
        card = {"cpu": None, "gpu": ("GPU", "nvidia.com/gpu"), "ascend": ("NPU", "huawei.com/Ascend910")}[hardware]
        assert pool.resources[ray_resource(docs, name)] == 1, "a worker takes a pod of its own pool, and all of it"
        if card:
            assert pool.resources[card[0]] == float(limits[card[1]])
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        worker = config.worker
        assert (worker.request_port, worker.control_port, worker.metrics_port) == (
            ports["request"],
            ports["control"],
            ports["baton-metrics"],
        )
        assert group["template"]["spec"]["terminationGracePeriodSeconds"] > worker.drain_timeout_s + 30
    service = only(docs, "Service", "baton-controller")
    ports = {port["name"]: port["port"] for port in service["spec"]["ports"]}
    assert config.router.membership == f"tcp://baton-controller:{ports['feed']}"
    assert config.router.controller == f"tcp://baton-controller:{ports['control']}"
    assert config.controller.metrics_port == ports["baton-metrics"]


def test_workers_of_a_new_release_fit_only_its_pods() -> None:
    """Another image, another Ray resource; another size or setting, the same pods."""
    before = rendered("gpu")
    for pool in ("prefill", "decode"):
        old = ray_resource(before, pool)
        assert ray_resource(rendered("gpu", False, True, "image.tag=next"), pool) != old
        assert ray_resource(rendered("gpu", False, True, f"{pool}.replicas=3", "config.kv.memory_mb=9"), pool) == old
        assert ray_resource(rendered("gpu", False, True, "security.revision=b"), pool) != old
    only_decode = rendered("gpu", False, True, "decode.shm=1Gi")
    assert ray_resource(only_decode, "prefill") == ray_resource(before, "prefill")
    assert ray_resource(only_decode, "decode") != ray_resource(before, "decode")


def test_configuration_sections_of_the_user_reach_baton() -> None:
    tree = config_tree(rendered("cpu", False, True, "config.kv.memory_mb=512", "config.transfer.checksum=count"))
    assert tree["kv"]["memory_mb"] == 512
    assert tree["transfer"]["checksum"] == "count"


def test_the_schema_is_the_one_that_the_code_asks_for() -> None:
    import importlib.util

    spec = importlib.util.spec_from_file_location("make_schema", CHART / "make_schema.py")
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = (CHART / "values.schema.json").read_text(encoding="utf-8")
    assert written == module.build(), "run: python helm/make_schema.py"


@pytest.mark.parametrize("helm", HELMS)
@pytest.mark.parametrize(
    ("hardware", "setting", "said"),
    [
        ("cpu", "decode.replica=2", "replica"),
        ("cpu", "decode.replicas=-1", "decode"),
        ("cpu", "decode.replicas=9", "minReplicas <= replicas <= maxReplicas, got 1 <= 9 <= 4"),
        ("cpu", "prefill.minReplicas=3", "got 3 <= 1 <= 4"),
        ("cpu", "decode.cards=8", "decode.cards=8: expected 0"),
        ("gpu", "decode.cards=0", "decode.cards=0: expected 1, 2, 4, 8 or 16"),
        ("ascend", "prefill.cards=7", "cards"),
        ("ascend", "worker.ports.request=25000", "worker.ports.request=25000: with 8 cards"),
        ("ascend", "accelerator.resource=", "accelerator.resource"),
        ("cpu", "worker.ports.metrics=61001", "a port is used twice"),
        ("cpu", "worker.ports.metrics=12000", "metrics"),
        ("cpu", "config.kv.memory_mbb=1", "memory_mbb"),
        ("cpu", "config.worker.request_port=7", "request_port"),
        ("cpu", "config.pools.decode.replicas=2", "pools"),
        ("cpu", "model.hostPath=/models", "exactly one of"),
        ("cpu", "model.generate=", "exactly one of"),
        ("gpu", "autoscaling.maxCards=8", "maxCards=8: the pools' replicas need 16"),
        ("cpu", "autoscaling.mode=maybe", "mode"),
        ("cpu", "fullnameOverride=2baton", "beginning with a letter"),
        ("cpu", "ray.version=2.40.0", "version"),
        ("cpu", "monitoring.slo.objective=1", "objective"),
        ("cpu", "router.gateway.enabled=true", "parentRefs"),
        ("cpu", "nonsense=1", "nonsense"),
    ],
)
def test_impossible_values_are_refused(helm: str, hardware: str, setting: str, said: str) -> None:
    assert said in refusal(helm, *options(hardware, False, True, setting))


@pytest.mark.parametrize(("cards", "accepted"), [(8, True), (16, False)])
def test_ascend_ports_clear_the_range_of_the_transport(cards: int, accepted: bool) -> None:
    sets = [f"{pool}.cards={cards}" for pool in ("prefill", "decode")]
    sets += [f"worker.ports.{name}={30000 + i}" for i, name in enumerate(("request", "control", "metrics"))]
    done = template(HELMS[-1], options("ascend", False, True, *sets))
    assert (done.code == 0) is accepted, done.err


@pytest.mark.parametrize(("hardware", "monitoring", "autoscaling"), CASES)
def test_pods_are_confined(hardware: str, monitoring: bool, autoscaling: bool) -> None:
    docs = rendered(hardware, monitoring, autoscaling, "ray.gcsFaultTolerance.redisAddress=redis:6379")
    for name, spec in pod_specs(docs).items():
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        for container in (*spec["containers"], *spec.get("initContainers", ())):
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] is True, name
            assert context["allowPrivilegeEscalation"] is False, name
            assert context["capabilities"] == {"drop": ["ALL"]}, name
            assert "memory" in container["resources"]["limits"], name
            secrets = [e for e in container.get("env", []) if "SECRET" in e["name"] or "KEY" in e["name"]]
            assert all("secretKeyRef" in e["valueFrom"] for e in secrets), f"{name}: a secret in plain sight"
        mounted = {mount["name"] for container in spec["containers"] for mount in container.get("volumeMounts", ())}
        assert mounted <= {volume["name"] for volume in spec.get("volumes", ())}, name
        if name not in ("head", "baton-release", "baton-renew"):
            assert spec.get("automountServiceAccountToken") is False, f"{name} needs no access to the API server"


def test_a_role_allows_the_least() -> None:
    docs = rendered("cpu")
    rules = only(docs, "Role", "baton-head")["rules"]
    assert {(r, tuple(rule["verbs"])) for rule in rules for r in rule["resources"]} == {
        ("configmaps", ("get", "patch")),
        ("pods", ("get", "list", "watch", "patch")),
        ("rayclusters", ("get", "patch")),
    }
    named = {r: rule.get("resourceNames") for rule in rules for r in rule["resources"]}
    assert named == {"configmaps": ["baton-pools"], "rayclusters": ["baton"], "pods": None}
    fixed = only(rendered("cpu", False, False), "Role", "baton-head")["rules"]
    assert [rule["resources"] for rule in fixed] == [["configmaps"]]


def test_a_driver_is_mounted_only_where_there_is_one() -> None:
    def mounts(hardware: str, *sets: str) -> set[str]:
        container = pod_specs(rendered(hardware, False, True, *sets))["decode"]["containers"][0]
        return {mount["mountPath"] for mount in container["volumeMounts"]}

    assert {"/etc/hccn.conf", "/usr/local/Ascend/driver", "/usr/local/dcmi"} <= mounts("ascend")
    assert "/etc/hccn.conf" not in mounts("gpu")
    assert "/usr/local/Ascend/driver" not in mounts("ascend", "accelerator.driverMounts=false")
    pod = pod_specs(rendered("ascend"))["prefill"]
    assert (pod["schedulerName"], pod["runtimeClassName"]) == ("volcano", "ascend")


@pytest.mark.parametrize(
    ("sets", "volume", "command"),
    [
        ((), {"persistentVolumeClaim": {"claimName": "deepseek-v32", "readOnly": True}}, []),
        (("model.pvc.claimName=", "model.hostPath=/data"), {"hostPath": {"path": "/data", "type": "Directory"}}, []),
        (
            ("model.pvc.claimName=", "model.objectStore.url=s3://b/m", "model.objectStore.cache.hostPath=/cache"),
            {"hostPath": {"path": "/cache", "type": "DirectoryOrCreate"}},
            ["--source", "s3://b/m", "--timeout", "14400"],
        ),
    ],
    ids=["pvc", "host", "store"],
)
def test_the_model_comes_from_where_it_is(sets: tuple[str, ...], volume: dict[str, Any], command: list[str]) -> None:
    specs = pod_specs(rendered("ascend", False, True, *sets))
    for name, weights in (("decode", True), ("prefill", True), ("baton-router", False)):
        spec = specs[name]
        assert {"name": "model", **volume} in spec["volumes"]
        init = spec["initContainers"][0]["command"]
        assert init[:6] == ["python", "-m", "deploy.kube", "model", "--path", "/models/checkpoint"]
        assert init[6:] == [*command, *([] if weights else ["--no-weights"])]


def test_network_policies_name_every_way_in() -> None:
    docs = rendered("cpu", True)
    ray = only(docs, "NetworkPolicy", "baton-ray")["spec"]
    assert ray["podSelector"]["matchLabels"] == {"ray.io/cluster": "baton"}
    own, routers, prometheus = ray["ingress"]
    assert "ports" not in own
    assert [port["port"] for port in routers["ports"]] == [61001, 7001, 7002]
    assert [port["port"] for port in prometheus["ports"]] == [61003, 7003]
    assert len(only(rendered("cpu", False), "NetworkPolicy", "baton-ray")["spec"]["ingress"]) == 2
    assert NAMESPACE == "serving"
