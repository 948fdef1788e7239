"""Behind the HTTP server: finds the handler, bounds what is open, answers every failure with an error object.

Life of a request: `App` → handler (`completions`, `chat_completions`) decodes and checks the body → prompts become
token ids → `generation.plan` lays out one sequence per choice → the dispatcher's chunks go through TextStream (bytes to
text, stop strings) and, for chats, the parser → an answer, or server-sent events as they come.
"""

from __future__ import annotations

import asyncio
import logging
import time

from llm_engine.api.errors import Overloaded, ServingError
from router.asgi import AsgiApp, serve_asgi
from router.edge import Edge
from router.exchange import Exchange
from router.failures import error_body, error_headers
from router.routes import Handler, find_route
from router.tenants import Tenants

logger = logging.getLogger(__name__)

STATUS_CLIENT_GONE = 499  # in metrics only
UNKNOWN_ROUTE = "unmatched"
ADMIN_PREFIX = "/admin/"


class App:
    """Serves exchanges; see `router.server`."""

    def __init__(self, edge: Edge, admin: AsgiApp | None = None, tenants: Tenants | None = None) -> None:
        """`admin` serves what is below ADMIN_PREFIX. `tenants`: whose requests are served (default: as configured)."""
        self._edge = edge
        self._tenants = tenants or Tenants(edge.config.tenants_file, time.monotonic)
        self._admin = admin
        self._open_generations = 0
        self._max_generations = edge.config.max_inflight + edge.config.max_queued

    async def __call__(self, exchange: Exchange) -> None:
        template = UNKNOWN_ROUTE
        status = 0
        try:
            if self._admin is not None and exchange.path.startswith(ADMIN_PREFIX):
                template = ADMIN_PREFIX
                await serve_asgi(self._admin, exchange)
            else:
                route = find_route(exchange.method, exchange.path)
                template = route.template
                if route.generates:
                    await self._generate(route.handler, exchange)
                else:
                    if route.needs_key:
                        self._tenants.check(exchange.headers)
                    await route.handler(self._edge, exchange)
        except asyncio.CancelledError:
            if not exchange.client_gone:
                raise
            status = STATUS_CLIENT_GONE
        except ServingError as exc:
            _fail(exchange, exc)
        except Exception:
            logger.exception("%s %s failed", exchange.method, exchange.path)
            _fail(exchange, ServingError("internal error; the router's log has the details"))
        self._edge.metrics.http_response(template, status or exchange.status, time.monotonic() - exchange.arrived)

    async def _generate(self, handler: Handler, exchange: Exchange) -> None:
        if self._open_generations >= self._max_generations:
            raise Overloaded(f"{self._open_generations} requests are open")
        self._open_generations += 1
        try:
            with self._tenants.admit(exchange.headers) as exchange.salt:
                await handler(self._edge, exchange)
        finally:
            self._open_generations -= 1


def _fail(exchange: Exchange, exc: ServingError) -> None:
    if exchange.status:
        exchange.abort()
    else:
        exchange.respond(exc.status, error_body(exc), headers=error_headers(exc))
