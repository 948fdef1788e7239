"""The desired state in a ConfigMap: `kubectl get configmap NAME-pools -o yaml` shows it, and it outlives every pod.

The chart creates the ConfigMap without data. What a release does not mention, Helm leaves alone.
"""

from __future__ import annotations

import msgspec

from deploy.desired import Desired
from deploy.kube.api import CONFIG_MAPS, KubeApi, KubeError

KEY = "desired.json"


class DesiredMap:
    """A DesiredStore."""

    def __init__(self, api: KubeApi, namespace: str, name: str) -> None:
        self._api = api
        self._path = CONFIG_MAPS.format(namespace=namespace, name=name)

    def desired(self) -> Desired | None:
        """What was saved last. Raises KubeError, also for data that can't be read: guessing would resize pools."""
        text = (self._api.get(self._path).get("data") or {}).get(KEY)
        if text is None:
            return None
        try:
            return msgspec.json.decode(text, type=Desired)
        except msgspec.MsgspecError as exc:
            raise KubeError(
                f"{self._path}: {KEY} is not a desired state ({exc}); delete that key to start over"
            ) from exc

    def save(self, desired: Desired) -> None:
        """Raises KubeError."""
        text = msgspec.json.format(msgspec.json.encode(desired), indent=1).decode()
        self._api.patch(self._path, {"data": {KEY: text}})
