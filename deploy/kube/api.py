"""The few calls Baton makes to the Kubernetes API server, with the pod's own service account."""

from __future__ import annotations

import json
import os
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_engine.api.errors import ServingError

SERVER_ENV = "BATON_KUBE_API"  # set only outside a pod: a proxy or a stub
_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_TIMEOUT_S = 10.0
_MAX_BYTES = 16 << 20
FIELD_MANAGER = "baton"

CONFIG_MAPS = "api/v1/namespaces/{namespace}/configmaps/{name}"
PODS = "api/v1/namespaces/{namespace}/pods"
RAY_CLUSTERS = "apis/ray.io/v1/namespaces/{namespace}/rayclusters/{name}"


class KubeError(ServingError):
    """The API server can't be reached or refused. `code`: its HTTP status, 0 if there was none."""

    def __init__(self, message: str, *, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


class KubeApi:
    """Objects by path. Every call has a deadline; errors are KubeError."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        given = environ.get(SERVER_ENV, "")
        self._server = (
            given or f"https://{_bracketed(environ.get('KUBERNETES_SERVICE_HOST', 'kubernetes.default.svc'))}"
        )
        if not given:
            self._server += f":{environ.get('KUBERNETES_SERVICE_PORT', '443')}"
        authority = _ACCOUNT / "ca.crt"
        context = ssl.create_default_context(cafile=str(authority) if authority.exists() else None)
        self._opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        )

    def get(self, path: str) -> dict[str, Any]:
        """The object, complete with its managed fields."""
        return self._call("GET", path)

    def patch(self, path: str, patch: dict[str, Any] | list[dict[str, Any]]) -> dict[str, Any]:
        """A dictionary is a merge patch, a list a JSON patch. Returns the object after it."""
        kind = "merge-patch" if isinstance(patch, dict) else "json-patch"
        return self._call("PATCH", f"{path}?fieldManager={FIELD_MANAGER}", patch, f"application/{kind}+json")

    def delete(self, path: str) -> None:
        """Begin to remove an object."""
        self._call("DELETE", path)

    def _call(self, method: str, path: str, body: Any = None, kind: str = "") -> dict[str, Any]:
        request = urllib.request.Request(f"{self._server}/{path}", method=method)
        request.add_header("Accept", "application/json")
        token = _ACCOUNT / "token"  # read each time: it is rotated
        if token.exists():
            request.add_header("Authorization", f"Bearer {token.read_text(encoding='utf-8').strip()}")
        if body is not None:
            request.data = json.dumps(body).encode()
            request.add_header("Content-Type", kind)
        what = f"{method} {path.partition('?')[0]}"
        try:
            with self._opener.open(request, timeout=_TIMEOUT_S) as response:
                answer: dict[str, Any] = json.loads(response.read(_MAX_BYTES))
        except urllib.error.HTTPError as exc:
            raise KubeError(f"Kubernetes refused {what}: {_reason(exc)}", code=exc.code) from exc
        except (OSError, ValueError) as exc:
            raise KubeError(f"Kubernetes does not answer {what}: {exc}") from exc
        return answer


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _reason(exc: urllib.error.HTTPError) -> str:
    try:
        return str(json.loads(exc.read(1 << 16)).get("message") or exc.reason)
    except (OSError, ValueError, AttributeError):
        return str(exc.reason)
