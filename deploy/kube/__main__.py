"""`python -m deploy.kube COMMAND`: what the chart's containers run. Exit codes: 0 done, 1 failed, 2 unusable input."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from llm_engine.api.errors import ConfigError, ServingError

EXIT_FAILED = 1
EXIT_CONFIG = 2


def parser() -> argparse.ArgumentParser:
    """The command line."""
    root = argparse.ArgumentParser(prog="python -m deploy.kube", description="What the containers of the chart run.")
    commands = root.add_subparsers(dest="command", required=True)
    head = commands.add_parser("head", help="run Ray's head and the controller")
    head.add_argument("--config", type=Path, required=True, metavar="FILE")
    model = commands.add_parser("model", help="fetch a checkpoint if a source is given, and check that it is complete")
    model.add_argument("--path", type=Path, required=True, metavar="DIR")
    model.add_argument("--source", default="", metavar="URL")
    model.add_argument("--no-weights", action="store_true", help="only what a router needs")
    model.add_argument("--timeout", type=float, default=4 * 3600.0, metavar="S")
    leave = commands.add_parser("leave", help="drain this pod's worker before the pod ends")
    leave.add_argument("--metrics", required=True, metavar="URL")
    leave.add_argument("--controller", required=True, metavar="ADDR")
    leave.add_argument("--timeout", type=float, required=True, metavar="S")
    release = commands.add_parser("release", help="let Helm own the worker groups of a RayCluster again")
    release.add_argument("--namespace", required=True)
    release.add_argument("--name", required=True)
    renew = commands.add_parser("renew", help="replace a head pod of an older kind")
    renew.add_argument("--namespace", required=True)
    renew.add_argument("--name", required=True)
    renew.add_argument("--timeout", type=float, default=600.0, metavar="S")
    smoke = commands.add_parser("smoke", help="ask the service for a few tokens")
    smoke.add_argument("--url", required=True)
    smoke.add_argument("--model", required=True)
    smoke.add_argument("--timeout", type=float, default=120.0, metavar="S")
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    args = parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        return _run(args)
    except ServingError as exc:
        print(f"{args.command}: {exc}", file=sys.stderr)
        return EXIT_CONFIG if isinstance(exc, ConfigError) else EXIT_FAILED


def _run(args: argparse.Namespace) -> int:
    if args.command == "head":
        from deploy.kube.head import run

        return run(args.config)
    if args.command == "model":
        return _model(args)
    if args.command == "leave":
        from deploy.kube.leave import leave

        leave(args.metrics, args.controller, args.timeout)
    elif args.command == "release":
        from deploy.kube.api import KubeApi
        from deploy.kube.ownership import release_worker_groups

        former = release_worker_groups(KubeApi(), args.namespace, args.name)
        print(f"{args.name}: worker groups taken over from {', '.join(former) or 'nobody'}")
    elif args.command == "renew":
        from deploy.kube.api import KubeApi
        from deploy.kube.renew import renew_head

        renewed = renew_head(KubeApi(), args.namespace, args.name, args.timeout)
        print(f"{args.name}: {'another head pod is ready' if renewed else 'the head pod is of this release'}")
    else:
        from deploy.kube.smoke import smoke

        smoke(args.url, args.model, api_key=os.environ.get("BATON_API_KEY", ""), timeout_s=args.timeout)
    return 0


def _model(args: argparse.Namespace) -> int:
    from deploy.kube.fetch import fetch, verify

    def say(text: str) -> None:
        print(text, flush=True)

    weights = not args.no_weights
    if args.source:
        fetch(args.source, args.path, weights=weights, timeout_s=args.timeout, say=say)
    count = verify(args.path, weights=weights)
    say(f"{args.path}: complete ({count} weight files)" if weights else f"{args.path}: what a router needs is there")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
