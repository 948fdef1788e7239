"""What the KubeRay operator and Ray's autoscaler ask of a RayCluster beyond its schema.

The operator's checks (utils/validation.go of KubeRay) are written out here; the autoscaler's reading is Ray's code.
"""

from __future__ import annotations

import copy
import re

import pytest
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

from tests.helm.charts import (
    CASES,
    NAMESPACE,
    VALUES,
    Manifest,
    config_tree,
    groups,
    only,
    pod_specs,
    ray_resource,
    rendered,
)

_TAKEN_BY_KUBERAY = {"metrics"}  # a container port of this name is replaced by the operator's own


def check(cluster: Manifest) -> None:
    """Raises AssertionError with the operator's reason."""
    spec, name = cluster["spec"], cluster["metadata"]["name"]
    assert len(name) <= 50, "its services' and pods' names would be too long"
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name), "not a DNS-1035 label"
    head, workers = spec["headGroupSpec"], spec["workerGroupSpecs"]
    assert len({group["groupName"] for group in workers}) == len(workers)
    for group in (head, *workers):
        params, pod = group["rayStartParams"], group["template"]["spec"]
        assert pod["containers"]
        own = {"num-cpus", "num-gpus", "memory", "resources"} & params.keys()
        assert not (own and group.get("resources")), "resources in both rayStartParams and the group"
        assert "labels" not in params, "labels belong to the group"
        assert all(isinstance(value, str) for value in params.values())
        assert not group.get("suspend")
        assert not _TAKEN_BY_KUBERAY & {port["name"] for port in pod["containers"][0].get("ports", ())}
        names = {variable["name"] for variable in pod["containers"][0]["env"]}
        assert not names & {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME", "RAY_enable_autoscaler_v2"}
        if spec["enableInTreeAutoscaling"]:
            assert pod.get("restartPolicy", "Never") == "Never", "autoscaler v2 replaces pods, it does not restart them"
    for group in workers:
        assert group["minReplicas"] <= group["maxReplicas"]
        if not spec["enableInTreeAutoscaling"]:
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    if spec["authOptions"]["mode"] == "token":
        version = tuple(int(part) for part in spec["rayVersion"].split("."))
        assert version >= (2, 52, 0)


@pytest.mark.parametrize(("hardware", "monitoring", "autoscaling"), CASES)
def test_the_operator_accepts_the_cluster(hardware: str, monitoring: bool, autoscaling: bool) -> None:
    check(only(rendered(hardware, monitoring, autoscaling), "RayCluster"))


@pytest.mark.parametrize("hardware", VALUES)
def test_the_autoscaler_finds_a_node_type_for_every_worker(hardware: str) -> None:
    """Ray reads the RayCluster; what a worker's actor asks for fits exactly one kind of node, once."""
    docs = rendered(hardware, False, True, "decode.maxReplicas=7")
    cluster = copy.deepcopy(only(docs, "RayCluster"))
    cluster["metadata"]["namespace"] = NAMESPACE
    for group in cluster["spec"]["workerGroupSpecs"]:
        group.setdefault("replicas", 0)
    types = _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
    assert types["headgroup"]["resources"]["CPU"] == 0, "an actor could be placed on the head"
    pools = config_tree(docs)["pools"]
    for name in groups(docs):
        pool, node = pools[name], types[name]
        assert node["min_workers"] == pool["min_replicas"]
        assert node["max_workers"] == pool["max_replicas"] + 1, "no room for a rollout"
        asked = pool["resources"]
        fitting = [kind for kind, found in types.items() if asked.items() <= found["resources"].items()]
        assert fitting == [name]
        own = ray_resource(docs, name)
        assert 2 * asked[own] > node["resources"][own], "two workers would share a pod's ports"


def test_cards_reach_ray() -> None:
    def params(hardware: str) -> dict[str, str]:
        docs = rendered(hardware)
        given = groups(docs)["decode"]["rayStartParams"].items()
        return {key: value.replace(ray_resource(docs, "decode"), "OWN") for key, value in given}

    assert params("ascend") == {"resources": r'"{\"NPU\":8,\"OWN\":1}"'}
    assert params("gpu") == {"num-gpus": "8", "resources": r'"{\"OWN\":1}"'}
    assert params("cpu") == {"resources": r'"{\"OWN\":1}"'}


@pytest.mark.parametrize("hardware", VALUES)
def test_helm_names_a_number_of_pods_only_when_nobody_else_does(hardware: str) -> None:
    assert all("replicas" not in group for group in groups(rendered(hardware)).values())
    for group in groups(rendered(hardware, False, False, "decode.maxReplicas=3")).values():
        assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]


def test_the_head_runs_baton_beside_ray() -> None:
    cluster = only(rendered("cpu"), "RayCluster")
    template = cluster["spec"]["headGroupSpec"]["template"]
    assert template["metadata"]["annotations"]["ray.io/overwrite-container-cmd"] == "true"
    head = pod_specs(rendered("cpu"))["head"]
    assert head["serviceAccountName"] == "baton-head"
    assert head["containers"][0]["command"] == [
        *("python", "-m", "deploy.kube", "head"),
        *("--config", "/etc/baton/config.toml"),
    ]
    for name in ("prefill", "decode"):
        assert "command" not in pod_specs(rendered("cpu"))[name]["containers"][0], (
            "KubeRay writes the start of a worker"
        )
