"""Closed-loop load on a running cluster: `baton bench serve --concurrency 16 --requests 64 --json`."""

from __future__ import annotations

import random
from collections.abc import Sequence

from benchmarks.loadgen import Job, run_closed_loop
from benchmarks.options import base_parser, execute, vocab_range


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = base_parser("baton bench serve", "Keep a fixed number of streams running and report what clients see.")
    parser.add_argument("--concurrency", type=int, default=16, help="streams at once")
    parser.add_argument("--requests", type=int, default=64, help="requests in all")
    parser.add_argument("--input-len", type=int, default=128, help="prompt tokens")
    parser.add_argument("--output-len", type=int, default=64, help="output tokens")
    parser.add_argument("--prefix-len", type=int, default=0, help="leading prompt tokens shared by all requests")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    args = parser.parse_args(argv)
    vocab, rng = vocab_range(args.vocab), random.Random(args.seed)
    prefix = rng.choices(vocab, k=min(args.prefix_len, args.input_len))
    jobs = [
        Job(
            prompt=prefix + rng.choices(vocab, k=args.input_len - len(prefix)),
            max_tokens=args.output_len,
            seed=args.seed + index,
            temperature=args.temperature,
        )
        for index in range(args.requests)
    ]
    return execute(
        args,
        jobs,
        lambda model, done: run_closed_loop(
            args.url, model, jobs, concurrency=args.concurrency, timeout_s=args.timeout_s, on_done=done
        ),
    )


if __name__ == "__main__":
    raise SystemExit(main())
