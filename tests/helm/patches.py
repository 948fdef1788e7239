"""What the API server makes of a patch."""

from __future__ import annotations

import copy
from typing import Any

Manifest = dict[str, Any]
_MERGE_KEYS = ("mountPath", "containerPort", "port", "name")  # of lists of objects, in this order


class TestFailed(Exception):
    """A `test` operation of a JSON patch did not hold."""

    __test__ = False


def merged(old: Any, patch: Any, strategic: bool = False) -> Any:
    """JSON merge patch; the strategic kind merges lists of named objects too."""
    if strategic and isinstance(patch, list) and isinstance(old, list):
        return _merged_list(old, patch)
    if not isinstance(patch, dict):
        return patch
    out = dict(old) if isinstance(old, dict) else {}
    for key, value in patch.items():
        if strategic and key.startswith("$"):
            continue
        if value is None:
            out.pop(key, None)
        else:
            out[key] = merged(out.get(key), value, strategic)
    return out


def _merged_list(old: list[Any], patch: list[Any]) -> list[Any]:
    key = next((k for k in _MERGE_KEYS if all(isinstance(item, dict) and k in item for item in (*old, *patch))), None)
    if key is None:
        return patch
    out = {item[key]: item for item in old}
    for item in patch:
        if item.get("$patch") == "delete":
            out.pop(item[key], None)
        else:
            out[item[key]] = merged(out.get(item[key]), item, True)
    return list(out.values())


def json_patched(old: Manifest, operations: list[dict[str, Any]]) -> Manifest:
    new = copy.deepcopy(old)
    for operation in operations:
        *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
        node: Any = new
        for part in parents:
            node = node[int(part)] if isinstance(node, list) else node[part]
        where: Any = int(last) if isinstance(node, list) else last
        if operation["op"] == "test":
            if node[where] != operation["value"]:
                raise TestFailed(f"test failed at {operation['path']}")
        else:
            node[where] = operation["value"]
    return new
