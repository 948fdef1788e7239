"""A worker as an operating-system process: command line, READY line, signals, exit codes.

Exit codes: 0 stopped (SIGTERM drains first), 1 failed (the step loop died, say), 2 unusable configuration,
130 interrupted.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from llm_engine.api.config import ClusterConfig, Resolved, cluster_key, load
from llm_engine.api.errors import ConfigError
from llm_engine.api.messages import WorkerInfo
from llm_engine.serving import preflight

_log = logging.getLogger(__name__)

# Threads of a kernel wait for each other in a busy loop, by default for longer than a step takes. On a machine whose
# cores are also wanted by routers and clients that stops the very thread they wait for. Read once, when torch loads.
_OPENMP_SPIN = {"GOMP_SPINCOUNT": "2000", "KMP_BLOCKTIME": "0"}  # about 0.1 ms with GNU's, none with LLVM's

EXIT_FAILED = 1
EXIT_CONFIG = 2
EXIT_INTERRUPTED = 130


class Serving(Protocol):
    """What a process needs of a worker."""

    async def start(self) -> WorkerInfo: ...

    async def serve(self) -> None: ...

    def stop(self, *, drain_s: float = 0.0) -> None: ...


Build = Callable[[ClusterConfig, str, argparse.Namespace], Serving]


def parser(prog: str, description: str) -> argparse.ArgumentParser:
    """The options every worker has."""
    parser = argparse.ArgumentParser(prog=f"python -m {prog}", description=description)
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="cluster configuration (TOML)")
    parser.add_argument("--name", default="", help="name of this worker in the cluster (default: role and process id)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="overrides", help="override one setting"
    )
    parser.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    return parser


def main(
    options: argparse.ArgumentParser, build: Build, argv: Sequence[str] | None = None, *, uses_control_port: bool
) -> int:
    """Build and serve until a signal; returns the exit code."""
    args = options.parse_args(argv)
    logging.basicConfig(
        level=args.log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    for name, value in _OPENMP_SPIN.items():
        os.environ.setdefault(name, value)
    try:
        resolved = load(args.config, args.overrides)
        _log_settings(resolved)
        config = resolved.config
        cluster_key()
        preflight.check_checkpoint(config.model.path)
        with preflight.hold_ports(config.worker, uses_control_port=uses_control_port):
            worker = build(config, args.name, args)  # imports torch, reads weights: everything cheap is checked by now
            return asyncio.run(_serve(worker, config))
    except ConfigError as exc:
        print(f"{options.prog}: {exc}", file=sys.stderr)
        return EXIT_CONFIG
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def exit_process(code: int) -> None:
    """End now. Threads of kernels and of ZeroMQ are not waited for: everything worth keeping has been sent."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


async def _serve(worker: Serving, config: ClusterConfig) -> int:
    loop = asyncio.get_running_loop()
    interrupted = False

    def terminate() -> None:
        loop.remove_signal_handler(signal.SIGTERM)  # a second SIGTERM ends the process at once
        _log.info("SIGTERM: draining for at most %.0f s", config.worker.drain_timeout_s)
        worker.stop(drain_s=config.worker.drain_timeout_s)

    def interrupt() -> None:
        nonlocal interrupted
        interrupted = True
        worker.stop()

    loop.add_signal_handler(signal.SIGTERM, terminate)
    loop.add_signal_handler(signal.SIGINT, interrupt)
    info = await worker.start()
    print(f"READY {msgspec.json.encode(info).decode()}", flush=True)
    try:
        await worker.serve()
    except ConfigError:
        raise
    except Exception:
        _log.critical("the worker failed; its requests are retried elsewhere", exc_info=True)
        return EXIT_FAILED
    return EXIT_INTERRUPTED if interrupted else 0


def _log_settings(resolved: Resolved) -> None:
    tree = resolved.config.model_dump(mode="json")
    for key, source in sorted(resolved.sources.items()):
        value = tree
        for part in key.split("."):
            value = value[part]
        _log.info("%s = %r (%s)", key, value, source)
