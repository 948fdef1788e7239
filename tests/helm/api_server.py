"""A stand-in for the Kubernetes API server: enough for Helm to install, upgrade, roll back and uninstall.

It stores, validates and tracks field owners (server-side apply, see fields.py); it defaults only the worker groups of a
RayCluster, runs no controllers, and executes the command of each Job, so that hooks do their real work against it.
"""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

from deploy.kube.api import SERVER_ENV
from tests.helm import kinds, protobuf
from tests.helm.discovery import KINDS, discovery, plural
from tests.helm.fields import Conflict, Manifest, applied, updated
from tests.helm.patches import TestFailed, json_patched, merged

_ROUTE = re.compile(
    r"/(?:api|apis/(?P<group>[^/]+))/(?P<version>v1)(?:/namespaces/(?P<namespace>[^/]+))?"
    r"/(?P<plural>[a-z]+)(?:/(?P<name>[^/]+))?(?P<status>/status)?$"
)
_WATCH_S = 20.0


Key = tuple[str, str, str]  # API version, plural, name


class Refused(Exception):
    """An answer other than 200."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code, self.reason = code, reason


class ApiServer:
    """One namespace's objects behind HTTP. A context manager."""

    def __init__(self) -> None:
        self.objects: dict[Key, Manifest] = {}
        self.jobs: list[tuple[str, int, str]] = []  # name, exit status and output of every Job's command
        self._events: list[tuple[int, str, Key, Manifest]] = []
        self._changed = threading.Condition(threading.RLock())
        self._stopping = False
        self._threads: list[threading.Thread] = []
        handler = type("Handler", (_Handler,), {"api": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> ApiServer:
        self._start(self._server.serve_forever, 0.05)
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._server.shutdown()
        self._server.server_close()
        for thread in self._threads:
            thread.join(30.0)

    def get(self, kind: str, name: str) -> Manifest:
        """An object by kind. Raises Refused 404."""
        version = next(version for version, names in KINDS.items() if kind in names)
        return self.read((version, plural(kind), name))

    def names(self) -> set[tuple[str, str]]:
        """Kind and name of everything but Helm's own records."""
        return {
            (o["kind"], o["metadata"]["name"]) for o in self.objects.values() if o.get("type") != "helm.sh/release.v1"
        }

    def read(self, key: Key) -> Manifest:
        with self._changed:
            if key not in self.objects:
                raise Refused(404, "NotFound", f"{key[1]} {key[2]!r} not found")
            return copy.deepcopy(self.objects[key])

    def listing(self, version: str, kind: str, labels: dict[str, str], name: str) -> tuple[list[Manifest], int]:
        with self._changed:
            found = [
                copy.deepcopy(obj)
                for key, obj in self.objects.items()
                if key[:2] == (version, kind) and _selected(obj, labels, name)
            ]
            return found, len(self._events)

    def create(self, key: Key, obj: Manifest, manager: str) -> Manifest:
        with self._changed:
            if key in self.objects:
                raise Refused(409, "AlreadyExists", f"{key[1]} {key[2]!r} already exists")
            return self._store(key, updated(None, _defaulted(obj), manager))

    def replace(self, key: Key, obj: Manifest, manager: str) -> Manifest:
        with self._changed:
            old = self.read(key)
            return self._store(key, updated(old, _defaulted(obj), manager))

    def patch(self, key: Key, patch: Any, kind: str, manager: str, *, force: bool = False) -> Manifest:
        """Every kind of patch; `kind` is its media type."""
        with self._changed:
            if "apply-patch" in kind:
                try:
                    result = applied(self.objects.get(key), patch, manager, force=force)
                except Conflict as exc:
                    raise Refused(409, "Conflict", f"Apply failed with 1 conflict: {exc}") from exc
                return self._store(key, _defaulted(result))
            old = self.read(key)
            try:
                new = json_patched(old, patch) if "json-patch" in kind else merged(old, patch, "strategic" in kind)
            except TestFailed as exc:
                raise Refused(422, "Invalid", str(exc)) from exc
            return self._store(key, updated(old, _defaulted(new), manager))

    def delete(self, key: Key) -> Manifest:
        with self._changed:
            gone = self.read(key)
            del self.objects[key]
            self._note("DELETED", key, gone)
            return gone

    def watch(self, version: str, kind: str, labels: dict[str, str], name: str, since: int) -> Iterator[Manifest]:
        """Events of matching objects until the server stops or a while has passed."""
        deadline = time.monotonic() + _WATCH_S
        while True:
            with self._changed:
                while len(self._events) <= since and not self._stopping and time.monotonic() < deadline:
                    self._changed.wait(0.5)
                if self._stopping or len(self._events) <= since:
                    return
                fresh, since = self._events[since:], len(self._events)
            for _, event, key, obj in fresh:
                if key[:2] == (version, kind) and _selected(obj, labels, name):
                    yield {"type": event, "object": obj}

    def _store(self, key: Key, obj: Manifest) -> Manifest:
        if obj.get("type") != "helm.sh/release.v1":
            _validated(obj)
        event = "MODIFIED" if key in self.objects else "ADDED"
        if event == "ADDED":
            obj["metadata"] |= {"uid": f"u{len(self._events)}", "creationTimestamp": "2026-01-01T00:00:00Z"}
            obj["metadata"].setdefault("generation", 1)
        self.objects[key] = obj
        self._note(event, key, obj)
        if (event, obj["kind"]) == ("ADDED", "Job"):
            self._start(self._run_job, key, copy.deepcopy(obj))
        return copy.deepcopy(obj)

    def _note(self, event: str, key: Key, obj: Manifest) -> None:
        obj["metadata"]["resourceVersion"] = str(len(self._events) + 1)
        self._events.append((len(self._events) + 1, event, key, copy.deepcopy(obj)))
        self._changed.notify_all()

    def _run_job(self, key: Key, job: Manifest) -> None:
        [container] = job["spec"]["template"]["spec"]["containers"]
        command = [sys.executable if word == "python" else word for word in container["command"]]
        done = subprocess.run(
            command, env={**os.environ, SERVER_ENV: self.url}, capture_output=True, text=True, timeout=60.0
        )
        self.jobs.append((key[2], done.returncode, done.stdout + done.stderr))
        outcome = "Complete" if done.returncode == 0 else "Failed"
        moment = "2026-01-01T00:00:01Z"
        status = {
            "startTime": moment,
            "conditions": [{"type": outcome, "status": "True", "lastTransitionTime": moment}],
        }
        status |= {"succeeded": 1, "completionTime": moment} if outcome == "Complete" else {"failed": 1}
        with self._changed:
            if key in self.objects:
                self._store(key, {**self.read(key), "status": status})

    def _start(self, target: Any, *args: Any) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()


class _Handler(BaseHTTPRequestHandler):
    api: ApiServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

    def _answer(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            found = discovery(url.path)
            if found is not None:
                self._send(200, found)
            elif query.get("watch") in ("true", "1"):
                self._stream(url.path, query)
            else:
                self._send(*self._carry_out(url.path, query, body))
        except Refused as exc:
            status = {"apiVersion": "v1", "kind": "Status", "status": "Failure", "message": str(exc)}
            self._send(exc.code, {**status, "reason": exc.reason, "code": exc.code})

    def _carry_out(self, path: str, query: dict[str, str], body: bytes) -> tuple[int, Manifest]:
        version, kind, name, namespace = _route(path)
        key = version, kind, name
        manager = query.get("fieldManager") or self.headers.get("User-Agent", "unknown").partition("/")[0]
        media = self.headers.get("Content-Type", "")
        match self.command:
            case "GET" if name:
                return 200, self.api.read(key)
            case "GET":
                items, at = self.api.listing(version, kind, *_selectors(query))
                of = next(k for k in KINDS[version] if plural(k) == kind)
                return 200, {
                    "apiVersion": version,
                    "kind": f"{of}List",
                    "metadata": {"resourceVersion": str(at)},
                    "items": items,
                }
            case "DELETE":
                return 200, self.api.delete(key)
            case "PATCH":
                patch = yaml.load(body, yaml.CSafeLoader)
                return 200, self.api.patch(key, patch, media, manager, force=query.get("force") == "true")
        obj = protobuf.secret(body) if body.startswith(protobuf.MAGIC) else json.loads(body)
        obj["metadata"].setdefault("namespace", namespace)
        if self.command == "PUT":
            return 200, self.api.replace(key, obj, manager)
        return 201, self.api.create((version, kind, obj["metadata"]["name"]), obj, manager)

    def _stream(self, path: str, query: dict[str, str]) -> None:
        if "sendInitialEvents" in query:
            raise Refused(422, "Invalid", "sendInitialEvents is forbidden")
        version, kind, _, _ = _route(path)
        labels, name = _selectors(query)
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        try:
            for event in self.api.watch(version, kind, labels, name, int(query.get("resourceVersion") or 0)):
                self.wfile.write(json.dumps(event).encode() + b"\n")
                self.wfile.flush()
        except OSError:
            return  # it has seen enough

    def _send(self, code: int, answer: Manifest) -> None:
        body = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _route(path: str) -> tuple[str, str, str, str]:
    match = _ROUTE.match(path)
    if match is None:
        raise Refused(404, "NotFound", f"no such path: {path}")
    version = f"{match['group']}/v1" if match["group"] else "v1"
    if version not in KINDS or match["plural"] not in map(plural, KINDS[version]):
        raise Refused(404, "NotFound", f"no such resource: {path}")
    return version, match["plural"], match["name"] or "", match["namespace"] or ""


def _selectors(query: dict[str, str]) -> tuple[dict[str, str], str]:
    pairs = [item.partition("=") for item in query.get("labelSelector", "").split(",") if item]
    name = query.get("fieldSelector", "").removeprefix("metadata.name=")
    return {key: value.lstrip("=") for key, _, value in pairs}, name


def _selected(obj: Manifest, labels: dict[str, str], name: str) -> bool:
    metadata = obj["metadata"]
    return labels.items() <= (metadata.get("labels") or {}).items() and name in ("", metadata["name"])


def _validated(obj: Manifest) -> None:
    plain = {key: value for key, value in obj.items() if key != "status"}
    plain["metadata"] = {k: v for k, v in obj["metadata"].items() if k in ("name", "labels", "annotations")}
    try:
        kinds.check(plain)
    except Exception as exc:
        raise Refused(422, "Invalid", str(exc).splitlines()[0]) from exc


def _defaulted(obj: Manifest) -> Manifest:
    for group in obj.get("spec", {}).get("workerGroupSpecs", []) if obj["kind"] == "RayCluster" else []:
        for key, value in (("replicas", 0), ("minReplicas", 0), ("numOfHosts", 1)):
            group.setdefault(key, value)
    return obj
