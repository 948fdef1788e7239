"""The operators' side of a router, beside the API: state, timelines, configuration, drain.

    GET  /admin/status              workers, pools, queues, recent requests
    GET  /admin/requests/{id}       stages and attempts of a running or recent request
    GET  /admin/config              the resolved configuration and where each value came from
    POST /admin/drain/{worker}      no new work for the worker; ?hand_back=true moves its running sequences elsewhere

With BATON_ADMIN_KEY set, every call needs `Authorization: Bearer KEY`. Without it, only loopback clients are served.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import parse_qs, unquote

import msgspec

from llm_engine.api.config import Resolved
from llm_engine.api.errors import RequestError, ServingError
from router.dispatcher import ClusterDispatcher
from router.exchange import Exchange
from router.failures import MethodNotAllowed, NotFound, error_body, error_headers

ADMIN_KEY_ENV = "BATON_ADMIN_KEY"
PREFIX = "/admin/"

AsgiApp = Callable[[Any, Any, Any], Awaitable[None]]


class Forbidden(RequestError):
    """The caller may not use the admin API."""

    status = 403


class UnknownName(RequestError):
    """There is no such worker or request (any more)."""

    status = 404


class AdminApp:
    """Serves PREFIX and passes everything else on to `app`."""

    def __init__(self, app: AsgiApp, dispatcher: ClusterDispatcher, resolved: Resolved, key: str) -> None:
        self._app = app
        self._dispatcher = dispatcher
        self._resolved = resolved
        self._key = key

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(PREFIX):
            await self._app(scope, receive, send)
            return
        exchange = Exchange(scope, receive, send, self._resolved.config.router.client_stall_s)
        try:
            self._authorize(scope)
            answer = self._answer(exchange.method, exchange.path.removeprefix(PREFIX), scope["query_string"])
        except ServingError as exc:
            await exchange.respond(exc.status, error_body(exc), headers=error_headers(exc))
            return
        await exchange.respond(200, msgspec.json.encode(answer))

    def _authorize(self, scope: Any) -> None:
        """Raises Forbidden."""
        if not self._key:
            client = scope.get("client")
            if client is None or not ipaddress.ip_address(client[0]).is_loopback:
                raise Forbidden(f"only loopback clients may use {PREFIX}; set {ADMIN_KEY_ENV} to admit others")
            return
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        if not hmac.compare_digest(given, b"Bearer " + self._key.encode()):
            raise Forbidden(f"send the key from {ADMIN_KEY_ENV} as Authorization: Bearer KEY")

    def _answer(self, method: str, path: str, query: bytes) -> Any:
        action, _, name = path.partition("/")
        name = unquote(name)
        if (action, bool(name)) not in {("status", False), ("config", False), ("requests", True), ("drain", True)}:
            raise NotFound(f"there is no {PREFIX}{path}")
        wanted = "POST" if action == "drain" else "GET"
        if method != wanted:
            raise MethodNotAllowed(f"{PREFIX}{action} takes {wanted}", allow=wanted)
        if action == "status":
            return self._dispatcher.status()
        if action == "config":
            config = self._resolved.config.model_dump(mode="json")
            return {"config": config, "sources": dict(self._resolved.sources)}
        if action == "requests":
            timeline = self._dispatcher.timeline(name)
            if timeline is None:
                raise UnknownName(f"request {name!r} is unknown, or too long ago")
            return timeline
        hand_back = parse_qs(query.decode("latin-1")).get("hand_back", ["false"])[-1] == "true"
        if not self._dispatcher.drain(name, hand_back=hand_back):
            raise UnknownName(f"worker {name!r} is unknown or can't be reached")
        return {"worker": name, "draining": True, "hand_back": hand_back}
