"""The router as an operating-system process: command line, READY line, signals, exit codes.

SIGTERM stops accepting and gives open requests `router.drain_timeout_s` to finish; SIGINT cuts them off. Exit codes:
0 stopped, 1 failed, 2 unusable configuration.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import prometheus_client
import uvloop

from llm_engine.api.config import Resolved, cluster_key, load
from llm_engine.api.errors import ConfigError, ServingError
from router.admin import build_admin, own_keys
from router.app import App
from router.control import ControllerPort
from router.dispatcher import ClusterDispatcher
from router.edge import Edge
from router.multiprocess import supervise
from router.server import HttpServer, listen
from router.tenants import Tenants
from router.tokenizer import read_json

logger = logging.getLogger(__name__)

EXIT_FAILED = 1
EXIT_CONFIG = 2
GC_THRESHOLD = 20_000  # container objects made and not freed
_PR_SET_PDEATHSIG = 1


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m router", description="Serve the OpenAI API over a Baton cluster.")
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="cluster configuration (TOML)")
    parser.add_argument(
        "--override",
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        dest="overrides",
        help="override one setting",
    )
    parser.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    parser.add_argument("--child-of", type=int, default=0, metavar="PID", help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until a signal; returns the exit code."""
    args = parser().parse_args(argv)
    logging.basicConfig(
        level=args.log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    if args.child_of:
        _die_with(args.child_of)
    try:
        resolved = load(args.config, args.overrides)
        cluster_key()  # before any expensive work
        if resolved.config.router.processes > 1 and not args.child_of:
            return supervise(resolved.config.router, sys.argv[1:] if argv is None else argv)
        for key, source in resolved.sources.items():
            logger.info("%s from %s", key, source)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(serve(resolved))
    except ConfigError as exc:
        print(f"router: {exc}", file=sys.stderr)
        return EXIT_CONFIG


async def serve(resolved: Resolved) -> int:
    """Serve on this loop until a signal. Raises ConfigError when something is unusable."""
    settings = resolved.config.router
    dispatcher = _dispatcher(resolved)
    try:
        edge = Edge.load(resolved.config, dispatcher, dispatcher.metrics)
        tenants = Tenants(
            settings.tenants_file, time.monotonic, share=lambda: max(settings.processes, dispatcher.num_routers)
        )
        controller = ControllerPort(settings.controller, cluster_key())
        admin = build_admin(dispatcher, resolved, lambda: (*own_keys(), *tenants.admin_keys()), controller)
        server = HttpServer(App(edge, admin, tenants), stall_s=settings.client_stall_s)
        sock = listen(settings.host, settings.port, reuse_port=settings.processes > 1)
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, server.stop, settings.drain_timeout_s)
        loop.add_signal_handler(signal.SIGINT, server.stop, 0.0)
        gc.collect()
        gc.freeze()  # what start-up made stays: no collection needs to look at it
        gc.set_threshold(GC_THRESHOLD)  # requests leave no cycles behind: collections find next to nothing
        ticking = asyncio.create_task(dispatcher.run(), name="dispatcher")
        serving = asyncio.create_task(server.serve(sock), name="http")
        _say_ready(sock)
        await asyncio.wait((ticking, serving), return_when=asyncio.FIRST_COMPLETED)
        if not ticking.done():
            ticking.cancel()
            await serving
            return 0
        logger.critical("the dispatcher died", exc_info=ticking.exception())
        server.stop(0.0)
        await serving
        return EXIT_FAILED
    finally:
        await dispatcher.close()


def _dispatcher(resolved: Resolved) -> ClusterDispatcher:
    checkpoint = read_json(resolved.config.model.path / "config.json")
    context_len = checkpoint.get("max_position_embeddings")
    eos = checkpoint.get("eos_token_id")
    eos_ids = eos if isinstance(eos, list) else [eos]
    return ClusterDispatcher(
        resolved.config,
        cluster_key(),
        context_len=context_len if isinstance(context_len, int) else None,
        eos_ids=frozenset(token for token in eos_ids if isinstance(token, int)),
    )


def _say_ready(sock: socket.socket) -> None:
    """The socket listens: connections made from now on are served."""
    host, port = sock.getsockname()[:2]
    name = f"[{host}]" if ":" in host else host
    ready = {"url": f"http://{name}:{port}", "host": host, "port": port, "pid": os.getpid()}
    print("READY " + json.dumps(ready), flush=True)


def _die_with(parent: int) -> None:
    """Be killed when the supervising process ends. Raises ServingError if it already has."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise ServingError(f"prctl(PR_SET_PDEATHSIG): {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent:
        raise ServingError("the supervising process is gone")


prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
