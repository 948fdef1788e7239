"""A release of the chart on the stand-in API server, and Ray's autoscaler beside it."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

from ray.autoscaler._private.kuberay.node_provider import IKubernetesHttpApiClient
from ray.autoscaler.v2.instance_manager.cloud_providers.kuberay.cloud_provider import KubeRayProvider

from tests.helm.api_server import ApiServer
from tests.helm.charts import CHART, NAMESPACE, RELEASE, Done, Manifest, run, tool

_KUBECONFIG = """
apiVersion: v1
kind: Config
clusters: [{{name: c, cluster: {{server: {url}}}}}]
users: [{{name: u, user: {{}}}}]
contexts: [{{name: x, context: {{cluster: c, user: u, namespace: {namespace}}}}}]
current-context: x
"""


class Release:
    """Helm of one version against one server."""

    def __init__(self, helm: str, api: ApiServer, scratch: Path) -> None:
        self._helm, self.api = helm, api
        kubeconfig = scratch / "kubeconfig"
        kubeconfig.write_text(_KUBECONFIG.format(url=api.url, namespace=NAMESPACE), encoding="utf-8")
        homes = {f"HELM_{kind}_HOME": str(scratch / kind.lower()) for kind in ("CACHE", "CONFIG", "DATA")}
        self._env = {"KUBECONFIG": str(kubeconfig), **homes}

    def try_(self, verb: str, *words: str) -> Done:
        """A command that may fail."""
        chart = [str(CHART)] if verb in ("install", "upgrade") else []
        return run(tool(self._helm), verb, RELEASE, *chart, *words, env=self._env)

    def do(self, verb: str, *words: str) -> str:
        """A command that must not."""
        done = self.try_(verb, *words)
        assert done.code == 0, f"{done.err}{self.api.jobs}"
        return done.out

    def cluster(self) -> Manifest:
        return self.api.get("RayCluster", RELEASE)

    def replicas(self) -> dict[str, int]:
        """Pods that the RayCluster asks for, by worker group."""
        return {group["groupName"]: group["replicas"] for group in self.cluster()["spec"]["workerGroupSpecs"]}

    def specs(self) -> dict[tuple[str, str], Any]:
        """What every object says, Helm's own records apart."""
        return {
            (obj["kind"], obj["metadata"]["name"]): {k: v for k, v in obj.items() if k not in ("metadata", "status")}
            for obj in self.api.objects.values()
            if obj.get("type") != "helm.sh/release.v1"
        }


class ApiClient(IKubernetesHttpApiClient):
    """What Ray's autoscaler uses to reach the API server, without a service account."""

    def __init__(self, url: str) -> None:
        self._url = url

    def get(self, path: str) -> dict[str, Any]:
        return self._call("GET", path)

    def patch(self, path: str, payload: Any, content_type: str = "application/json-patch+json") -> dict[str, Any]:
        return self._call("PATCH", path, payload, content_type)

    def delete(self, path: str) -> dict[str, Any]:
        return self._call("DELETE", path)

    def _call(self, method: str, path: str, body: Any = None, kind: str = "") -> dict[str, Any]:
        root = "apis/ray.io/v1" if path.startswith("rayclusters") else "api/v1"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self._url}/{root}/namespaces/{NAMESPACE}/{path}", data, method=method)
        request.add_header("User-Agent", "python-requests/2.32")
        if kind:
            request.add_header("Content-Type", kind)
        with urllib.request.urlopen(request, timeout=10.0) as response:
            answer: dict[str, Any] = json.loads(response.read())
        return answer


class Autoscaler:
    """Ray's own KubeRay provider, with the operator's part played here: a pod for each replica."""

    def __init__(self, api: ApiServer) -> None:
        self._api = api
        self._turns = 0
        self.provider = KubeRayProvider(RELEASE, {"namespace": NAMESPACE}, None, ApiClient(api.url))

    def grow(self, pool: str, by: int) -> None:
        """Placement asks for more nodes of a pool."""
        self._turns += 1
        self.provider.launch({pool: by}, f"turn-{self._turns}")
        assert not self.provider.poll_errors()
        self.operate()

    def operate(self) -> None:
        """KubeRay adds pods up to `replicas`; with Ray's autoscaler on it removes only those it is told to."""
        for group in self._api.get("RayCluster", RELEASE)["spec"]["workerGroupSpecs"]:
            name = group["groupName"]
            wanted = max(group["replicas"], group["minReplicas"])
            for number in range(len(self.pods(name)), wanted):
                pod_name = f"{RELEASE}-{name}-{number}"
                labels = {"ray.io/cluster": RELEASE, "ray.io/node-type": "worker", "ray.io/group": name}
                pod = {
                    "apiVersion": "v1",
                    "kind": "Pod",
                    "metadata": {"name": pod_name, "namespace": NAMESPACE, "labels": labels},
                    "spec": {"containers": [{"name": "ray-worker", "image": "x"}]},
                    "status": {"phase": "Running", "containerStatuses": [{"state": {"running": {}}}]},
                }
                self._api.create(("v1", "pods", pod_name), pod, "kuberay-operator")

    def pods(self, pool: str) -> list[str]:
        found, _ = self._api.listing("v1", "pods", {"ray.io/group": pool}, "")
        return [pod["metadata"]["name"] for pod in found]
