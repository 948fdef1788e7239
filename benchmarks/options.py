"""Command-line options and the run loop that the load benchmarks share."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import httpx
from rich.console import Console
from rich.progress import Progress

from benchmarks.loadgen import Job, Outcome, scrape, served_model
from benchmarks.report import show, summarise

Runner = Callable[[str, Callable[[Outcome], None]], Awaitable[list[Outcome]]]


def base_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """Options every load benchmark takes."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the router (default %(default)s)")
    parser.add_argument("--vocab", default="3:259", metavar="LOW:HIGH", help="ids prompts are drawn from")
    parser.add_argument("--seed", type=int, default=1, help="seed of prompts and sampling")
    parser.add_argument("--timeout-s", type=float, default=600.0, help="bound of one request")
    parser.add_argument("--slo-ttft-ms", type=float, default=1000.0, help="TTFT a request must meet to be goodput")
    parser.add_argument("--slo-tpot-ms", type=float, default=100.0, help="TPOT a request must meet to be goodput")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--out", type=Path, help="also write the JSON report to this file")
    return parser


def vocab_range(text: str) -> range:
    """`LOW:HIGH` as a range. Raises SystemExit with one line on anything else."""
    low, _, high = text.partition(":")
    if not (low.isdigit() and high.isdigit() and int(low) < int(high)):
        raise SystemExit(f"--vocab {text!r}: expected LOW:HIGH with LOW < HIGH")
    return range(int(low), int(high))


def execute(args: argparse.Namespace, jobs: Sequence[Job], runner: Runner) -> int:
    """Run the jobs with a progress bar, print the report; exit status 1 when a request failed, 2 without a server."""
    try:
        report = asyncio.run(_measure(args, jobs, runner))
    except httpx.HTTPError as exc:
        print(f"{args.url}: {exc or type(exc).__name__}; is the cluster up?", file=sys.stderr)
        return 2
    show(report, args.json)
    if args.out:
        args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 1 if report["errors"] else 0


async def _measure(args: argparse.Namespace, jobs: Sequence[Job], runner: Runner) -> dict[str, object]:
    model = await served_model(args.url)
    before = await scrape(args.url)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("requests", total=len(jobs))
        start = time.perf_counter()
        outcomes = await runner(model, lambda _: progress.advance(bar))
        wall_s = time.perf_counter() - start
    return summarise(
        outcomes,
        wall_s,
        slo_ttft_ms=args.slo_ttft_ms,
        slo_tpot_ms=args.slo_tpot_ms,
        before=before,
        after=await scrape(args.url),
    )
