"""Replay a real trace against a running cluster: `baton bench replay --trace FILE --limit 200 --json`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.loadgen import run_open_loop
from benchmarks.options import base_parser, execute, vocab_range
from benchmarks.traces import read_mooncake, to_jobs


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = base_parser("baton bench replay", "Replay real arrivals, lengths and shared prefixes of a Mooncake trace.")
    parser.add_argument("--trace", type=Path, required=True, help="Mooncake trace (JSON lines)")
    parser.add_argument("--limit", type=int, default=100, help="requests to take from its start")
    parser.add_argument("--time-scale", type=float, default=1.0, help="multiply arrival times; 0 sends all at once")
    parser.add_argument("--length-scale", type=float, default=1.0, help="multiply prompt and output lengths")
    parser.add_argument("--max-len", type=int, default=4096, help="cut prompt + output to this many tokens")
    args = parser.parse_args(argv)
    try:
        rows = read_mooncake(args.trace, args.limit)
    except (OSError, ValueError) as exc:
        print(f"--trace: {exc}", file=sys.stderr)
        return 2
    if not rows:
        print(f"--trace: {args.trace} holds no rows", file=sys.stderr)
        return 2
    jobs = to_jobs(
        rows,
        time_scale=args.time_scale,
        length_scale=args.length_scale,
        vocab=vocab_range(args.vocab),
        max_len=args.max_len,
        seed=args.seed,
    )
    return execute(
        args,
        jobs,
        lambda model, done: run_open_loop(args.url, model, jobs, timeout_s=args.timeout_s, on_done=done),
    )


if __name__ == "__main__":
    raise SystemExit(main())
