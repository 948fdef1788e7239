"""The operators' side of a router, beside the API: state, timelines, configuration, pools, drain.

    GET  /admin/status              workers, pools, queues, recent requests
    GET  /admin/metrics             the same text as /metrics
    GET  /admin/requests/{id}       stages and attempts of a running or recent request
    GET  /admin/config              the resolved configuration and where each value came from
    GET  /admin/pools               pools as the controller sees them: sizes, bounds, workers, who changed what and why
    PUT  /admin/pools/{pool}        {"replicas": N, "reason": "…"}: the same order to the controller as `baton scale`
    POST /admin/drain/{worker}      no new work for the worker; ?hand_back=true moves its running sequences elsewhere

With BATON_ADMIN_KEY set (or keys under `[admin]` in router.tenants_file), every call needs `Authorization: Bearer KEY`.
Without a key only loopback clients are served, and of browsers only pages that this router served itself.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Callable, Collection
from typing import Annotated, Any
from urllib.parse import urlsplit

import msgspec
from fastapi import Depends, FastAPI, Request, Response
from starlette.exceptions import HTTPException

from llm_engine.api.config import Resolved
from llm_engine.api.control import GetStatus, ScalePool
from llm_engine.api.errors import RequestError, ServingError
from router.control import ControllerPort
from router.dispatcher import ClusterDispatcher
from router.failures import MethodNotAllowed, NotFound, error_body, error_headers
from router.requests import decode_body
from router.tenants import is_loopback

ADMIN_KEY_ENV = "BATON_ADMIN_KEY"


class Forbidden(RequestError):
    """The caller may not use the admin API."""

    status = 403


class UnknownName(RequestError):
    """There is no such worker or request (any more)."""

    status = 404


class PoolBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of PUT /admin/pools/{pool}."""

    replicas: Annotated[int, msgspec.Meta(ge=0)]
    reason: Annotated[str, msgspec.Meta(max_length=200)] = ""


Keys = Callable[[], Collection[str]]  # the admin keys that are valid now

_pool_decoder = msgspec.json.Decoder(PoolBody)


def build_admin(dispatcher: ClusterDispatcher, resolved: Resolved, keys: Keys, controller: ControllerPort) -> FastAPI:
    """The admin API. Failures are answered with the same error object as the API's."""

    def authorize(request: Request) -> None:
        check_caller(request, keys())

    api = FastAPI(title="Baton admin", openapi_url=None, redirect_slashes=False, dependencies=[Depends(authorize)])
    api.add_exception_handler(ServingError, _serving_error)
    api.add_exception_handler(HTTPException, _http_error)

    @api.get("/admin/status")
    async def status() -> Response:
        return _json(dispatcher.status())

    @api.get("/admin/metrics")
    async def metrics() -> Response:
        return Response(dispatcher.metrics.render(), media_type="text/plain; version=0.0.4")

    @api.get("/admin/pools")
    async def pools() -> Response:
        return _json(await controller.ask(GetStatus()))

    @api.put("/admin/pools/{pool}")
    async def scale(pool: str, request: Request) -> Response:
        body = decode_body(_pool_decoder, await request.body())
        order = ScalePool(pool=pool, replicas=body.replicas, by="admin", reason=body.reason)
        return _json((await controller.ask(order)).pools)

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


def own_keys() -> tuple[str, ...]:
    """The admin key of the environment, if there is one."""
    key = os.environ.get(ADMIN_KEY_ENV, "")
    return (key,) if key else ()


def check_caller(request: Request, keys: Collection[str]) -> None:
    """Raises Forbidden."""
    if not keys:
        if request.client is None or not is_loopback(request.client.host):
            raise Forbidden(f"only loopback clients may use /admin/; set {ADMIN_KEY_ENV} to admit others")
        _check_page(request)
        return
    given = request.headers.get("authorization", "").encode("latin-1")
    if not any(hmac.compare_digest(given, b"Bearer " + key.encode()) for key in keys):
        raise Forbidden(f"send the key from {ADMIN_KEY_ENV} as Authorization: Bearer KEY")


def _check_page(request: Request) -> None:
    """A browser on this machine may show pages of strangers, and any name may resolve to loopback. Raises Forbidden."""
    host, origin = request.headers.get("host", ""), request.headers.get("origin")
    name = urlsplit(f"//{host}").hostname or "localhost"
    if name != "localhost" and not is_loopback(name):
        raise Forbidden(f"without {ADMIN_KEY_ENV}, /admin/ is served under a loopback address only, not as {name!r}")
    if origin is not None and urlsplit(origin).netloc != host:
        raise Forbidden(f"without {ADMIN_KEY_ENV}, pages from {origin} may not use /admin/")


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
