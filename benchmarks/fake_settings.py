"""How a fake worker behaves, and its command line."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass

from llm_engine.api.messages import Role


@dataclass(slots=True, kw_only=True)
class FakeSettings:
    """How the worker behaves. Tests may change the last group while it runs."""

    name: str = "fake"
    role: Role = Role.AGGREGATED
    port: int = 0
    model: str = "fake"
    format_id: str = "fake-format"
    block_tokens: int = 16
    num_blocks: int = 65536
    max_num_seqs: int = 512
    max_model_len: int = 1 << 20
    heartbeat_s: float = 0.25
    grant_timeout_s: float = 1.0
    prefill_s: float = 0.0
    prefill_tokens_per_s: float = 1e7
    step_s: float = 0.005
    tokens_per_step: int = 1
    max_waiting: int = 1 << 20

    muted: bool = False  # says nothing, as if its network were cut
    swallow_kv_events: int = 0  # events lost on the way
    swallow_snapshots: int = 0
    swallow_accepts: int = 0
    fail_next: int = 0  # submits answered with `fail_code`
    fail_code: str = "full"
    fail_retryable: bool = True
    lose_deltas: int = 0  # messages with tokens lost on the way
    bad_peers: tuple[str, ...] = ()
    healthy: bool = True


def parse(argv: Sequence[str] | None) -> FakeSettings:
    """Settings from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fake_worker", description="A worker that computes nothing."
    )
    parser.add_argument("--role", choices=[role.value for role in Role], required=True)
    parser.add_argument("--name", default="")
    parser.add_argument("--port", type=int, default=0, help="request port on loopback (default: any free one)")
    parser.add_argument("--model", default="fake")
    parser.add_argument("--block-tokens", type=int, default=16)
    parser.add_argument("--num-blocks", type=int, default=65536)
    parser.add_argument("--max-num-seqs", type=int, default=512)
    parser.add_argument("--max-model-len", type=int, default=1 << 20)
    parser.add_argument("--heartbeat-ms", type=float, default=250.0)
    parser.add_argument("--prefill-ms", type=float, default=0.0, help="fixed time of a prefill")
    parser.add_argument("--prefill-tokens-per-s", type=float, default=1e7)
    parser.add_argument("--step-ms", type=float, default=5.0, help="time of a decode step")
    parser.add_argument("--tokens-per-step", type=int, default=1)
    args = parser.parse_args(argv)
    return FakeSettings(
        name=args.name or f"{args.role}-{os.getpid()}",
        role=Role(args.role),
        port=args.port,
        model=args.model,
        block_tokens=args.block_tokens,
        num_blocks=args.num_blocks,
        max_num_seqs=args.max_num_seqs,
        max_model_len=args.max_model_len,
        heartbeat_s=args.heartbeat_ms / 1e3,
        prefill_s=args.prefill_ms / 1e3,
        prefill_tokens_per_s=args.prefill_tokens_per_s,
        step_s=args.step_ms / 1e3,
        tokens_per_step=args.tokens_per_step,
    )
