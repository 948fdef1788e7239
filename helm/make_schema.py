"""Write values.schema.json: `python helm/make_schema.py`, after a change of values.yaml or of Baton's configuration.

The part for `config` follows from the configuration's own types, so a misspelt key is refused before anything is
installed. Keys that the chart sets itself are left out of it: each of them has one place among the values.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from llm_engine.api.config import ClusterConfig
from router.metrics import RouterMetrics

FILE = Path(__file__).parent / "values.schema.json"

# Sections and keys that follow from other values.
CHART_SETS: dict[str, tuple[str, ...]] = {
    "model": ("*",),
    "pools": ("*",),
    "engine": ("backend",),
    "worker": ("host", "request_port", "control_port", "metrics_port", "drain_timeout_s"),
    "controller": ("host", "feed_port", "control_port", "metrics_port", "start_timeout_s"),
    "router": (
        "host",
        "port",
        "processes",
        "workers",
        "membership",
        "controller",
        "tenants_file",
        "drain_timeout_s",
    ),
    "autoscaler": ("mode", "max_cards", "ttft_slo_s", "tpot_slo_s", "router_metrics"),
}

STRING = {"type": "string"}
BOOL = {"type": "boolean"}
COUNT = {"type": "integer", "minimum": 0, "maximum": 1024}
SECONDS = {"type": "integer", "minimum": 0, "maximum": 86400}
POSITIVE = {"type": "number", "exclusiveMinimum": 0}
QUANTITY = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?$"}
LABELS = {"type": "object", "additionalProperties": STRING}
ANY_OBJECT = {"type": "object"}
OBJECTS = {"type": "array", "items": ANY_OBJECT}
RAY_PORTS = {"minimum": 10002, "maximum": 19999}  # Ray's worker processes listen there
PORT = {"type": "integer", "minimum": 1024, "maximum": 65535, "not": RAY_PORTS}


def record(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    """An object without other keys."""
    schema: dict[str, Any] = {"type": "object", "additionalProperties": False, "properties": properties}
    return {**schema, "required": list(required)} if required else schema


def one_of(*values: Any) -> dict[str, Any]:
    """An enumeration."""
    return {"enum": list(values)}


RESOURCES = record(requests={"type": "object"}, limits={"type": "object"})
PLACEMENT = {
    "nodeSelector": LABELS,
    "tolerations": OBJECTS,
    "affinity": ANY_OBJECT,
    "priorityClassName": STRING,
}
POOL = record(
    required=("replicas", "minReplicas", "maxReplicas", "cards"),
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    cards=one_of(0, 1, 2, 4, 8, 16),
    resources=RESOURCES,
    shm=QUANTITY,
    idleSeconds=SECONDS,
    topologySpreadConstraints=OBJECTS,
    podLabels=LABELS,
    podAnnotations=LABELS,
    env={"type": "object", "additionalProperties": {"type": ["string", "number", "boolean"]}},
    **PLACEMENT,
)


def bounds(histogram: str) -> dict[str, Any]:
    """Bounds of a histogram's buckets: an objective between two of them could not be judged."""
    [family] = [found for found in RouterMetrics().registry.collect() if found.name == histogram]
    les = [float(sample.labels["le"]) for sample in family.samples if "le" in sample.labels]
    return one_of(*(int(le) if le.is_integer() else le for le in les if le != float("inf")))


def values() -> dict[str, Any]:
    """The schema of everything but `config`."""
    return dict(
        nameOverride=STRING,
        fullnameOverride=STRING,
        image=record(
            required=("repository",),
            repository={"type": "string", "minLength": 1},
            tag=STRING,
            digest={"type": "string", "pattern": "^(sha256:[0-9a-f]{64})?$"},
            pullPolicy=one_of("Always", "IfNotPresent", "Never"),
        ),
        imagePullSecrets=OBJECTS,
        ray=record(
            version={"type": "string", "pattern": r"^2\.(5[2-9]|[6-9][0-9])\.[0-9]+$"},
            auth=one_of("token", "disabled"),
            gcsFaultTolerance=ANY_OBJECT,
        ),
        accelerator=record(
            required=("type",),
            type=one_of("cpu", "gpu", "ascend"),
            resource={"type": "string", "pattern": r"^([a-z0-9.-]+/[A-Za-z0-9._-]+)?$"},
            runtimeClassName=STRING,
            driverMounts=BOOL,
            hccnConf={"type": "string", "pattern": "^(/.*)?$"},
        ),
        model=record(
            required=("name",),
            name={"type": "string", "minLength": 1},
            maxLen={"type": ["integer", "null"], "minimum": 16},
            generate=one_of("", "nano", "tiny", "tiny-gpu"),
            hostPath={"type": "string", "pattern": "^(/.*)?$"},
            pvc=record(claimName=STRING, subPath=STRING),
            objectStore=record(
                url={"type": "string", "pattern": "^((s3|gs|az|https|file)://.+)?$"},
                secretName=STRING,
                timeoutSeconds=SECONDS,
                cache=record(hostPath={"type": "string", "pattern": "^(/.*)?$"}, claimName=STRING, sizeLimit=STRING),
            ),
            resources=RESOURCES,
        ),
        prefill={"$ref": "#/$defs/pool"},
        decode={"$ref": "#/$defs/pool"},
        aggregated={"$ref": "#/$defs/pool"},
        worker=record(
            ports=record(required=("request", "control", "metrics"), request=PORT, control=PORT, metrics=PORT),
            drainSeconds=SECONDS,
            preflight=BOOL,
            hostNetwork=BOOL,
            hostIPC=BOOL,
            podSecurityContext=ANY_OBJECT,
            securityContext=ANY_OBJECT,
            extraVolumes=OBJECTS,
            extraVolumeMounts=OBJECTS,
        ),
        scheduler=record(name=STRING, queue=STRING),
        controller=record(
            ports=record(required=("feed", "control", "metrics"), feed=PORT, control=PORT, metrics=PORT),
            startSeconds={**SECONDS, "minimum": 1},
            resources=RESOURCES,
            **PLACEMENT,
        ),
        router=record(
            replicas=COUNT,
            processes={"type": "integer", "minimum": 1, "maximum": 64},
            port=PORT,
            drainSeconds=SECONDS,
            resources=RESOURCES,
            service=record(
                type=one_of("ClusterIP", "NodePort", "LoadBalancer"),
                port={"type": "integer", "minimum": 1, "maximum": 65535},
                annotations=LABELS,
            ),
            ingress=record(enabled=BOOL, className=STRING, host=STRING, tlsSecretName=STRING, annotations=LABELS),
            gateway={
                **record(enabled=BOOL, parentRefs=OBJECTS, hostnames={"type": "array", "items": STRING}),
                "if": {"properties": {"enabled": {"const": True}}},
                "then": {"properties": {"parentRefs": {"minItems": 1}}},
            },
            maxUnavailable={"type": "integer", "minimum": 1},
            topologySpreadConstraints=OBJECTS,
            podLabels=LABELS,
            podAnnotations=LABELS,
            **PLACEMENT,
        ),
        autoscaling=record(
            enabled=BOOL,
            mode=one_of("off", "recommend", "act"),
            maxCards={"type": ["integer", "null"], "minimum": 1},
            ttftSeconds=POSITIVE,
            tpotSeconds=POSITIVE,
        ),
        security=record(existingSecret=STRING, revision=STRING, tenantsSecret=STRING),
        networkPolicy=record(enabled=BOOL, clients=OBJECTS, monitoring=OBJECTS),
        monitoring=record(
            enabled=BOOL,
            labels=LABELS,
            interval={"type": "string", "pattern": "^[0-9]+(ms|s|m)$"},
            slo=record(
                ttftSeconds=bounds("baton_ttft_seconds"),
                tpotSeconds=bounds("baton_tpot_seconds"),
                objective={"type": "number", "minimum": 0.5, "exclusiveMaximum": 1},
            ),
            dashboards=record(enabled=BOOL, label=STRING, labelValue=STRING, folderAnnotation=STRING, folder=STRING),
        ),
        tests=record(enabled=BOOL, apiKeySecret=STRING),
        **{"global": ANY_OBJECT},  # Helm passes it to every chart
    )


def configuration() -> tuple[dict[str, Any], dict[str, Any]]:
    """Schema of `config`, and the definitions it refers to: Baton's configuration without what the chart sets."""
    schema = _plain(ClusterConfig.model_json_schema())
    definitions = schema.pop("$defs")
    for section, keys in CHART_SETS.items():
        if keys == ("*",):
            definitions.pop(schema["properties"].pop(section)["$ref"].rpartition("/")[2])
            continue
        properties = definitions[schema["properties"][section]["$ref"].rpartition("/")[2]]["properties"]
        for key in keys:
            del properties[key]
    definitions.pop("PoolConfig", None)
    return schema, definitions


def _plain(node: Any) -> Any:
    """Without what only matters to Python: defaults, titles, and keys that a file must have."""
    if isinstance(node, list):
        return [_plain(item) for item in node]
    if not isinstance(node, dict):
        return node
    dropped = {"default", "title", "required", "description", "format"}
    return {
        key: {name: _plain(item) for name, item in value.items()} if key == "properties" else _plain(value)
        for key, value in node.items()
        if key not in dropped
    }


def build() -> str:
    """The whole file."""
    config, definitions = configuration()
    schema = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "$comment": "Written by make_schema.py",
        **record(**values(), config=config),
        "$defs": {"pool": POOL, **definitions},
    }
    return json.dumps(schema, indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    FILE.write_text(build(), encoding="utf-8")
    print(f"{FILE} written", file=sys.stderr)
