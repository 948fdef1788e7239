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
from typing import Any

import msgspec
from fastapi import Depends, FastAPI, Request, Response
from starlette.exceptions import HTTPException

from llm_engine.api.config import Resolved
from llm_engine.api.errors import RequestError, ServingError
from router.dispatcher import ClusterDispatcher
from router.failures import MethodNotAllowed, NotFound, error_body, error_headers

ADMIN_KEY_ENV = "BATON_ADMIN_KEY"


class Forbidden(RequestError):
    """The caller may not use the admin API."""

    status = 403


class UnknownName(RequestError):
    """There is no such worker or request (any more)."""

    status = 404


def build_admin(dispatcher: ClusterDispatcher, resolved: Resolved, key: str) -> FastAPI:
    """The admin API. Failures are answered with the same error object as the API's."""

    def authorize(request: Request) -> None:
        check_caller(request, key)

    api = FastAPI(title="Baton admin", openapi_url=None, redirect_slashes=False, dependencies=[Depends(authorize)])
    api.add_exception_handler(ServingError, _serving_error)
    api.add_exception_handler(HTTPException, _http_error)

    @api.get("/admin/status")
    async def status() -> Response:
        return _json(dispatcher.status())

    @api.get("/admin/config")
    async def config() -> Response:
        return _json({"config": resolved.config.model_dump(mode="json"), "sources": dict(resolved.sources)})

    @api.get("/admin/requests/{request_id:path}")
    async def request_timeline(request_id: str) -> Response:
        timeline = dispatcher.timeline(request_id)
        if timeline is None:
            raise UnknownName(f"request {request_id!r} is unknown, or too long ago")
        return _json(timeline)

    @api.post("/admin/drain/{worker:path}")
    async def drain(worker: str, hand_back: str = "false") -> Response:
        moves = hand_back == "true"
        if not dispatcher.drain(worker, hand_back=moves):
            raise UnknownName(f"worker {worker!r} is unknown or can't be reached")
        return _json({"worker": worker, "draining": True, "hand_back": moves})

    return api


def check_caller(request: Request, key: str) -> None:
    """Raises Forbidden."""
    if not key:
        if request.client is None or not ipaddress.ip_address(request.client.host).is_loopback:
            raise Forbidden(f"only loopback clients may use /admin/; set {ADMIN_KEY_ENV} to admit others")
        return
    given = request.headers.get("authorization", "")
    if not hmac.compare_digest(given.encode("latin-1"), b"Bearer " + key.encode()):
        raise Forbidden(f"send the key from {ADMIN_KEY_ENV} as Authorization: Bearer KEY")


def _json(answer: Any) -> Response:
    return Response(msgspec.json.encode(answer), media_type="application/json")


def _serving_error(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, ServingError)
    headers = {name.decode(): value.decode() for name, value in error_headers(exc)}
    return Response(error_body(exc), exc.status, headers, media_type="application/json")


def _http_error(request: Request, exc: Exception) -> Response:
    """No such route, or not with this method."""
    assert isinstance(exc, HTTPException)
    path = request.url.path
    if exc.status_code == 405:
        allow = (exc.headers or {}).get("Allow", "")
        return _serving_error(request, MethodNotAllowed(f"{path} takes {allow}", allow=allow))
    return _serving_error(request, NotFound(f"there is no {path}"))
