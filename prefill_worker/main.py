"""Entry point of a prefill worker process."""

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
    return process.main(
        process.parser(
            "prefill_worker", "Computes prompts, draws the first token and hands the KV cache to a decode worker."
        ),
        _build,
        argv,
        uses_control_port=False,
    )


def _build(config: ClusterConfig, name: str, args: argparse.Namespace) -> process.Serving:
    from prefill_worker.worker import PrefillWorker  # torch: imported once the configuration is known to be good

    return PrefillWorker.build(config, name)
