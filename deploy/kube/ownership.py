"""Let Helm 4 update a RayCluster that the Ray autoscaler has scaled.

The API server treats `spec.workerGroupSpecs` as one indivisible list: whoever writes one number in it owns all of it.
The autoscaler writes `replicas`, so Helm's next server-side apply would be refused as a conflict. Before an upgrade or
a rollback the owners of the list other than Helm are therefore struck from the object's managed fields. Nothing else
changes: the pods are kept, because a lower `replicas` removes none while the autoscaler is on, and it restores the
number from the pods it sees.
"""

from __future__ import annotations

import copy
import logging
import time
from typing import Any

from deploy.kube.api import RAY_CLUSTERS, KubeApi, KubeError

_log = logging.getLogger(__name__)
_LIST = "f:workerGroupSpecs"
_TRIES = 5
_PAUSE_S = 0.5


def release_worker_groups(api: KubeApi, namespace: str, name: str, keep: str = "helm") -> list[str]:
    """Take the list away from everybody but `keep`; returns the managers that had it. Raises KubeError.

    A RayCluster that does not exist (any more) is fine: there is nothing to take over.
    """
    path = RAY_CLUSTERS.format(namespace=namespace, name=name)
    for attempt in range(_TRIES):
        try:
            found = api.get(path)
        except KubeError as exc:
            if exc.code == 404:
                return []
            raise
        fields, former = without_list(found["metadata"].get("managedFields") or [], keep)
        if not former:
            return []
        version = found["metadata"]["resourceVersion"]
        try:
            api.patch(
                path,
                [
                    {"op": "test", "path": "/metadata/resourceVersion", "value": version},
                    {"op": "replace", "path": "/metadata/managedFields", "value": fields},
                ],
            )
            return former
        except KubeError as exc:
            if attempt == _TRIES - 1 or exc.code not in (409, 422):
                raise
            _log.info("%s changed meanwhile: once more", name)
            time.sleep(_PAUSE_S)
    return []


def without_list(managed: list[dict[str, Any]], keep: str) -> tuple[list[dict[str, Any]], list[str]]:
    """`managed` fields with the list struck from every manager but `keep`, and the managers that had it."""
    kept, former = [], []
    for entry in copy.deepcopy(managed):
        spec = entry.get("fieldsV1", {}).get("f:spec", {})
        if entry.get("manager") == keep or _LIST not in spec:
            kept.append(entry)
            continue
        former.append(str(entry.get("manager")))
        del spec[_LIST]
        if not spec:
            del entry["fieldsV1"]["f:spec"]
        if entry["fieldsV1"]:
            kept.append(entry)
    return kept, former
