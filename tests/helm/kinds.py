"""Check objects as the API server does: built-in kinds strictly, custom kinds against their definitions."""

from __future__ import annotations

import json
import logging
from functools import cache
from typing import Any

import jsonschema
import yaml

from tests.helm.charts import Manifest, schemas

KUBERNETES = "1.37"
_CRDS = {
    ("ray.io/v1", "RayCluster"): "ray.io_rayclusters.yaml",
    ("monitoring.coreos.com/v1", "PodMonitor"): "monitoring.coreos.com_podmonitors.yaml",
    ("monitoring.coreos.com/v1", "ServiceMonitor"): "monitoring.coreos.com_servicemonitors.yaml",
    ("monitoring.coreos.com/v1", "PrometheusRule"): "monitoring.coreos.com_prometheusrules.yaml",
}
UNCHECKED = {("gateway.networking.k8s.io/v1", "HTTPRoute")}  # its definition is not at hand


def check(doc: Manifest) -> None:
    """Raises with the path of the first field that the API server would refuse."""
    _check(json.dumps(doc, sort_keys=True))


@cache
def _check(text: str) -> None:
    doc = json.loads(text)
    identity = doc["apiVersion"], doc["kind"]
    if identity in _CRDS:
        _validator(*identity).validate(doc)
    elif identity not in UNCHECKED:
        import kubernetes_validate

        logging.getLogger("kubernetes_validate").setLevel(logging.ERROR)
        kubernetes_validate.validate(doc, KUBERNETES, strict=True)


@cache
def _validator(api_version: str, kind: str) -> jsonschema.Draft7Validator:
    text = (schemas("crds") / _CRDS[api_version, kind]).read_text(encoding="utf-8")
    [version] = [
        version
        for version in yaml.load(text, yaml.CSafeLoader)["spec"]["versions"]
        if version["name"] == api_version.partition("/")[2]
    ]
    schema = _as_json_schema(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return jsonschema.Draft7Validator(schema)


def _as_json_schema(node: Any) -> Any:
    """OpenAPI's dialect in JSON Schema's terms; fields that are not declared are refused."""
    if isinstance(node, list):
        return [_as_json_schema(item) for item in node]
    if not isinstance(node, dict):
        return node
    out = {key: _as_json_schema(value) for key, value in node.items()}
    if out.pop("x-kubernetes-int-or-string", False) is True:
        out.pop("type", None)
        out["type"] = ["integer", "string"]
    if out.pop("nullable", False) is True and isinstance(out.get("type"), str):
        out["type"] = [out["type"], "null"]
    if isinstance(out.get("properties"), dict) and not node.get("x-kubernetes-preserve-unknown-fields"):
        out.setdefault("additionalProperties", False)
    return out
