"""Who owns which field of an object: server-side apply as far as the chart's tests need it.

Maps are merged key by key; every list is one indivisible value, as `workerGroupSpecs` of a RayCluster is.
"""

from __future__ import annotations

import copy
from typing import Any

Manifest = dict[str, Any]
FieldPath = tuple[str, ...]

_IDENTITY = {("apiVersion",), ("kind",), ("metadata", "name"), ("metadata", "namespace")}
_SERVERS = {"managedFields", "resourceVersion", "uid", "creationTimestamp", "generation"}


class Conflict(Exception):
    """Another manager owns a field that the applied configuration wants to have otherwise."""


def leaves(node: Any, path: FieldPath = ()) -> dict[FieldPath, Any]:
    """Values by path. An empty map is a value."""
    if isinstance(node, dict) and node:
        found: dict[FieldPath, Any] = {}
        for key, value in node.items():
            if not (path == ("metadata",) and key in _SERVERS):
                found.update(leaves(value, (*path, key)))
        return found
    return {} if path in _IDENTITY or not path else {path: node}


def updated(old: Manifest | None, new: Manifest, manager: str) -> Manifest:
    """`new` with the fields that changed given to `manager`."""
    before, after = leaves(old or {}), leaves(new)
    changed = {path for path, value in after.items() if path not in before or before[path] != value}
    gone = changed | (set(before) - set(after))
    owners = {who: fields - gone for who, fields in _owners(new).items()}
    owners[manager, "Update"] = owners.get((manager, "Update"), set()) | changed
    return _with_owners(new, owners)


def applied(live: Manifest | None, config: Manifest, manager: str, *, force: bool) -> Manifest:
    """The object after server-side apply. Raises Conflict unless forced."""
    live = copy.deepcopy(live) if live is not None else {key: config[key] for key in ("apiVersion", "kind", "metadata")}
    owners, now, wanted = _owners(live), leaves(live), leaves(config)
    mine = (manager, "Apply")
    for path, value in wanted.items():
        holders = [who for who, fields in owners.items() if who != mine and path in fields]
        if holders and now.get(path) != value:
            if not force:
                raise Conflict(f'conflict with "{holders[0][0]}": .{".".join(path)}')
            for who in holders:
                owners[who] -= {path}
        _put(live, path, value)
    dropped = owners.get(mine, set()) - set(wanted)
    owners[mine] = set(wanted)
    for path in dropped:
        if not any(path in fields for fields in owners.values()):
            _drop(live, path)
    return _with_owners(live, owners)


def _owners(obj: Manifest) -> dict[tuple[str, str], set[FieldPath]]:
    entries = obj.get("metadata", {}).get("managedFields") or []
    return {(entry["manager"], entry["operation"]): set(_paths(entry["fieldsV1"])) for entry in entries}


def _with_owners(obj: Manifest, owners: dict[tuple[str, str], set[FieldPath]]) -> Manifest:
    entries = []
    for (manager, operation), fields in owners.items():
        tree: dict[str, Any] = {}
        for path in fields:
            node = tree
            for part in path:
                node = node.setdefault(f"f:{part}", {})
        if tree:
            entries.append({"manager": manager, "operation": operation, "fieldsType": "FieldsV1", "fieldsV1": tree})
    return {**obj, "metadata": {**obj["metadata"], "managedFields": entries}}


def _paths(tree: dict[str, Any], path: FieldPath = ()) -> list[FieldPath]:
    return [
        found
        for key, value in tree.items()
        for found in (_paths(value, (*path, key[2:])) if value else [(*path, key[2:])])
    ]


def _put(obj: Manifest, path: FieldPath, value: Any) -> None:
    for part in path[:-1]:
        obj = obj.setdefault(part, {})
    obj[path[-1]] = copy.deepcopy(value)


def _drop(obj: Manifest, path: FieldPath) -> None:
    for part in path[:-1]:
        obj = obj.get(part, {})
    obj.pop(path[-1], None)
