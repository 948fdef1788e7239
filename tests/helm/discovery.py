"""What the stand-in API server says that it serves."""

from __future__ import annotations

from typing import Any

Manifest = dict[str, Any]

KINDS = {
    "v1": ["Namespace", "ConfigMap", "Secret", "Service", "ServiceAccount", "Pod"],
    "apps/v1": ["Deployment"],
    "batch/v1": ["Job"],
    "policy/v1": ["PodDisruptionBudget"],
    "networking.k8s.io/v1": ["NetworkPolicy", "Ingress"],
    "rbac.authorization.k8s.io/v1": ["Role", "RoleBinding"],
    "monitoring.coreos.com/v1": ["PodMonitor", "ServiceMonitor", "PrometheusRule"],
    "ray.io/v1": ["RayCluster"],
}
_PLURALS = {"NetworkPolicy": "networkpolicies", "Ingress": "ingresses"}


def plural(kind: str) -> str:
    """Its name in a path."""
    return _PLURALS.get(kind, f"{kind.lower()}s")


def discovery(path: str) -> Manifest | None:
    groups = [version for version in KINDS if "/" in version]
    if path == "/version":
        return {"major": "1", "minor": "33", "gitVersion": "v1.33.0"}
    if path.startswith("/openapi/v3"):
        return _openapi(path.removeprefix("/openapi/v3").strip("/"))
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        versions = [{"groupVersion": version, "version": "v1"} for version in groups]
        return {
            "kind": "APIGroupList",
            "apiVersion": "v1",
            "groups": [
                {"name": v["groupVersion"].partition("/")[0], "versions": [v], "preferredVersion": v} for v in versions
            ],
        }
    version = path.removeprefix("/apis/").removeprefix("/api/")
    if version not in KINDS:
        return None
    verbs = ["create", "delete", "get", "list", "patch", "update", "watch"]
    resources = [
        {"name": plural(kind), "kind": kind, "namespaced": kind != "Namespace", "singularName": "", "verbs": verbs}
        for kind in KINDS[version]
    ]
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": resources}


def _openapi(of: str) -> Manifest:
    """Only that this server checks the fields of what it is given, so that its clients need not."""
    where = {f"apis/{version}" if "/" in version else f"api/{version}": version for version in KINDS}
    if not of:
        return {"paths": {path: {"serverRelativeURL": f"/openapi/v3/{path}"} for path in where}}
    group, _, version = where[of].rpartition("/")
    paths = {
        f"/{of}/namespaces/{{namespace}}/{plural(kind)}/{{name}}": {
            "patch": {
                "parameters": [{"name": "fieldValidation", "in": "query", "schema": {"type": "string"}}],
                "x-kubernetes-group-version-kind": {"group": group, "version": version, "kind": kind},
                "responses": {},
            }
        }
        for kind in KINDS[where[of]]
    }
    return {"openapi": "3.0.0", "info": {"title": "stand-in", "version": "1"}, "paths": paths}
