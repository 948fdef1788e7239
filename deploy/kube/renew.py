"""After an upgrade: replace a head pod of the old kind.

KubeRay leaves pods alone when their template changes (its strategy `Recreate` takes all of them at once, workers
included). Where Ray keeps its tables outside the head, another head pod interrupts nothing: workers stay, the next
controller takes them over, and routers go on with the membership they have.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from deploy.kube.api import PODS, RAY_CLUSTERS, KubeApi, KubeError
from llm_engine.api.errors import ServingError

_log = logging.getLogger(__name__)

KIND = "baton/head"  # annotation: a digest of the head pod's specification
_POLL_S = 0.5


class NotRenewed(ServingError):
    """No head pod of the new kind got ready in time."""


def renew_head(api: KubeApi, namespace: str, name: str, timeout_s: float) -> bool:
    """Whether the head had to be replaced. Returns when one of the RayCluster's present kind is ready.

    Raises KubeError, NotRenewed.
    """
    deadline = time.monotonic() + timeout_s
    renewed = False
    pods = PODS.format(namespace=namespace)
    while True:
        wanted = _kind(
            api.get(RAY_CLUSTERS.format(namespace=namespace, name=name))["spec"]["headGroupSpec"]["template"]
        )
        found = api.get(f"{pods}?labelSelector=ray.io/cluster={name},ray.io/node-type=head")["items"]
        for pod in found:
            if _kind(pod) != wanted and "deletionTimestamp" not in pod["metadata"]:
                _log.info("%s: of an older kind; deleting it", pod["metadata"]["name"])
                _delete(api, f"{pods}/{pod['metadata']['name']}")
                renewed = True
        if any(_kind(pod) == wanted and _ready(pod) for pod in found):
            return renewed
        if time.monotonic() > deadline:
            raise NotRenewed(
                f"{name}: no head pod of the new kind is ready within {timeout_s:g} s: kubectl describe pod"
            )
        time.sleep(_POLL_S)


def _kind(pod: dict[str, Any]) -> str:
    return str((pod.get("metadata", {}).get("annotations") or {}).get(KIND, ""))


def _ready(pod: dict[str, Any]) -> bool:
    conditions = pod.get("status", {}).get("conditions") or []
    return any(condition["type"] == "Ready" and condition["status"] == "True" for condition in conditions)


def _delete(api: KubeApi, path: str) -> None:
    try:
        api.delete(path)
    except KubeError as exc:
        if exc.code != 404:  # it went by itself
            raise
