"""The ASGI application: finds the handler, bounds what is open, and answers every failure with an error object.

Life of a request: `App` → handler (`completions`, `chat_completions`) decodes and checks the body → prompts become
token ids → `generation.plan` lays out one sequence per choice → the dispatcher's chunks go through TextStream (bytes to
text, stop strings) and, for chats, the parser → an answer, or server-sent events as they come.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from llm_engine.api.errors import Overloaded, ServingError
from router.edge import Edge
from router.exchange import ClientGone, Exchange
from router.failures import error_body, error_headers
from router.routes import find_route

logger = logging.getLogger(__name__)

STATUS_CLIENT_GONE = 499  # in metrics only
UNKNOWN_ROUTE = "unmatched"


class App:
    """Serves HTTP scopes; see `router.server.make_server`."""

    def __init__(self, edge: Edge) -> None:
        self._edge = edge
        self._open_generations = 0
        self._max_generations = edge.config.max_inflight + edge.config.max_queued

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            raise NotImplementedError(f"{scope['type']} is not served")
        exchange = Exchange(scope, receive, send, self._edge.config.client_stall_s)
        template = UNKNOWN_ROUTE
        status = 0
        try:
            route = find_route(exchange.method, exchange.path)
            template = route.template
            if route.generates:
                await self._generate(route.handler, exchange)
            else:
                await route.handler(self._edge, exchange)
        except ClientGone:
            status = STATUS_CLIENT_GONE
        except ServingError as exc:
            await self._fail(exchange, exc)
        except Exception:
            logger.exception("%s %s failed", exchange.method, exchange.path)
            await self._fail(exchange, ServingError("internal error; the router's log has the details"))
        self._edge.metrics.http_response(template, status or exchange.status, time.monotonic() - exchange.arrived)

    async def _generate(self, handler: Any, exchange: Exchange) -> None:
        if self._open_generations >= self._max_generations:
            raise Overloaded(f"{self._open_generations} requests are open")
        self._open_generations += 1
        try:
            await handler(self._edge, exchange)
        finally:
            self._open_generations -= 1

    async def _fail(self, exchange: Exchange, exc: ServingError) -> None:
        if not exchange.status:
            await exchange.respond(exc.status, error_body(exc), headers=error_headers(exc))
        # Else the answer has begun: the server closes the connection, so that it can't pass for a complete one.
