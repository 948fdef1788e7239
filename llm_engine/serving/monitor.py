"""The HTTP endpoint of a worker: /metrics, /health and /ready, served by a thread of its own.

It answers also while the asyncio loop or the step loop hangs: that is when health matters.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import make_wsgi_app

from llm_engine.api.errors import ConfigError

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

MAX_CONNECTIONS = 16

Probe = Callable[[], str | None]  # None: fine; otherwise one line saying what is wrong


class _Handler(WSGIRequestHandler):
    timeout = 5.0  # a client that sends or reads nothing does not hold its thread

    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes are not news."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 2 * MAX_CONNECTIONS

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._slots = threading.BoundedSemaphore(MAX_CONNECTIONS)
        super().__init__(*args, **kwargs)

    def server_bind(self) -> None:
        """As the base class, without asking a name server who this host is."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._slots.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is not an error of the worker."""


class Monitor:
    """Serves one registry and two probes until `close()`."""

    def __init__(self, registry: CollectorRegistry, *, health: Probe, ready: Probe) -> None:
        self._metrics = make_wsgi_app(registry)
        self._probes = {"/health": health, "/ready": ready}
        self._server: WSGIServer | None = None

    def start(self, host: str, port: int) -> str:
        """Listen and serve; returns the address of /metrics. Raises ConfigError when the port is taken."""
        try:
            self._server = make_server(host, port, self._respond, server_class=_Server, handler_class=_Handler)
        except OSError as exc:
            raise ConfigError(f"worker.metrics_port={port}: can't listen on {host}: {exc.strerror}") from exc
        threading.Thread(target=self._server.serve_forever, args=(0.1,), name="monitor", daemon=True).start()
        return f"http://{host}:{self._server.server_port}/metrics"

    def close(self) -> None:
        """Stop listening. Idempotent."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def _respond(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if path == "/metrics":
            body: Iterable[bytes] = self._metrics(environ, start_response)
            return body
        probe = self._probes.get(path)
        if probe is None:
            status, text = "404 Not Found", "paths: /metrics /health /ready"
        else:
            trouble = probe()
            status, text = ("200 OK", "ok") if trouble is None else ("503 Service Unavailable", trouble)
        start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
        return [f"{text}\n".encode()]
