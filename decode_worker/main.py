"""Entry point of a decode or aggregated worker process."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from kv_transfer.sender import SWITCH_S
from llm_engine.api.config import ClusterConfig
from llm_engine.serving import process


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until a signal; returns the exit code."""
    sys.setswitchinterval(SWITCH_S)
    options = process.parser(
        "decode_worker", "Takes KV caches over from prefill workers and draws the remaining tokens."
    )
    options.add_argument(
        "--role",
        choices=["decode", "aggregated"],
        default="decode",
        help="aggregated: prefill and decode in one engine, without hand-offs (default: decode)",
    )
    return process.main(options, _build, argv, uses_control_port=True)


def _build(config: ClusterConfig, name: str, args: argparse.Namespace) -> process.Serving:
    from decode_worker.aggregated import AggregatedWorker  # torch: imported once the configuration is known to be good
    from decode_worker.worker import DecodeWorker

    return (AggregatedWorker if args.role == "aggregated" else DecodeWorker).build(config, name)
