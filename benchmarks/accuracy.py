"""What a running Baton-nano knows: `baton eval --url http://127.0.0.1:8000 --json`.

Every skill is asked with problems that were never trained on. Answers are greedy and must match exactly; tool calls and
JSON are compared as values.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.grading import Verdict, ask, wilson
from benchmarks.loadgen import served_model
from benchmarks.machine import machine
from llm_engine.training.samples import Sample, draw
from llm_engine.training.skills import EVALUATION

_SHORT_SAMPLES = 6
_DRAFTS, _ACCEPTED = "baton_draft_tokens_total", "baton_accepted_tokens_total"

Problem = tuple[str, Sample]


def problems(skills: Sequence[str], samples: int, seed: int) -> list[Problem]:
    """`samples` held-out problems of every skill, the same for the same seed; skills take turns."""
    rngs = {skill: random.Random(f"evaluation {seed} {skill}") for skill in skills}
    return [(skill, draw(EVALUATION[skill], rng, held_out=True)) for _ in range(samples) for skill, rng in rngs.items()]


async def evaluate(
    url: str, asked: Sequence[Problem], *, concurrency: int, timeout_s: float, on_done: Callable[[], object]
) -> list[Verdict]:
    """Ask all problems, `concurrency` at a time."""
    model = await served_model(url)
    slots = asyncio.Semaphore(concurrency)
    limits = httpx.Limits(max_connections=concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=timeout_s, limits=limits, trust_env=False) as client:

        async def one(number: int, skill: str, sample: Sample) -> Verdict:
            async with slots:
                verdict = await ask(client, skill, sample, model, number)
            on_done()
            return verdict

        return list(await asyncio.gather(*(one(i, skill, sample) for i, (skill, sample) in enumerate(asked))))


def summarise(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Score and confidence interval by skill, lengths, and the first wrong answers."""
    skills: dict[str, Any] = {}
    for skill in dict.fromkeys(verdict.skill for verdict in verdicts):
        own = [verdict for verdict in verdicts if verdict.skill == skill]
        right = sum(verdict.right for verdict in own)
        low, high = wilson(right, len(own))
        skills[skill] = {
            "right": right,
            "samples": len(own),
            "score": round(right / len(own), 4),
            "interval": [round(low, 4), round(high, 4)],
            "prompt_tokens": median(verdict.prompt_tokens for verdict in own),
            "output_tokens": median(verdict.output_tokens for verdict in own),
        }
    errors = [verdict.error for verdict in verdicts if verdict.error]
    wrong = [verdict for verdict in verdicts if not verdict.right and not verdict.error]
    return {
        "skills": skills,
        "errors": len(errors),
        "first_error": errors[0] if errors else "",
        "wrong": [{"skill": v.skill, "question": v.question, "wanted": v.wanted, "got": v.got} for v in wrong[:10]],
    }


async def draft_counts(metrics: Sequence[str]) -> tuple[float, float]:
    """First drafts verified and accepted so far, over the workers whose metrics addresses are given."""
    verified = accepted = 0.0
    async with httpx.AsyncClient(timeout=10.0, trust_env=False) as client:
        for address in metrics:
            text = (await client.get(address)).raise_for_status().text
            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    if sample.labels.get("position") == "0":
                        verified += sample.value * (sample.name == _DRAFTS)
                        accepted += sample.value * (sample.name == _ACCEPTED)
    return verified, accepted


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 when a request failed and 2 when there is no server."""
    args = _parser().parse_args(argv)
    samples = _SHORT_SAMPLES if args.short else args.samples
    asked = problems(args.skills, samples, args.seed)
    try:
        report = asyncio.run(_measure(args, asked))
    except httpx.HTTPError as exc:
        print(f"{args.url}: {exc or type(exc).__name__}; is the cluster up?", file=sys.stderr)
        return 2
    if args.out:
        args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        _show(report)
    return 1 if report["errors"] else 0


async def _measure(args: argparse.Namespace, asked: Sequence[Problem]) -> dict[str, Any]:
    before = await draft_counts(args.metrics)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("questions", total=len(asked))
        start = time.perf_counter()
        verdicts = await evaluate(
            args.url,
            asked,
            concurrency=args.concurrency,
            timeout_s=args.timeout_s,
            on_done=lambda: progress.advance(bar),
        )
        wall_s = time.perf_counter() - start
    verified, accepted = (new - old for new, old in zip(await draft_counts(args.metrics), before, strict=True))
    return summarise(verdicts) | {
        "first_draft_acceptance": round(accepted / verified, 4) if verified else None,
        "drafts": int(verified),
        "seed": args.seed,
        "wall_s": round(wall_s, 1),
        "machine": machine(),
    }


def _show(report: dict[str, Any]) -> None:
    table = Table(title=f"{sum(s['samples'] for s in report['skills'].values())} questions in {report['wall_s']} s")
    for column in ("skill", "right", "of", "score", "95 % interval", "prompt tokens"):
        table.add_column(column, justify="left" if column == "skill" else "right")
    for skill, facts in report["skills"].items():
        low, high = facts["interval"]
        table.add_row(
            skill,
            str(facts["right"]),
            str(facts["samples"]),
            f"{facts['score']:.1%}",
            f"{low:.1%} – {high:.1%}",
            f"{facts['prompt_tokens']:g}",
        )
    console = Console()
    console.print(table)
    if report["first_draft_acceptance"] is not None:
        console.print(f"first draft accepted: {report['first_draft_acceptance']:.1%} of {report['drafts']}")
    if report["first_error"]:
        console.print(f"{report['errors']} requests failed, the first with: {report['first_error']}", markup=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="baton eval", description="Ask a running Baton-nano held-out questions and score the answers."
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the router (default %(default)s)")
    parser.add_argument("--skills", type=_skills, default=list(EVALUATION), metavar="A,B", help="default: all of them")
    parser.add_argument("--samples", type=int, default=100, metavar="N", help="questions of a skill (default 100)")
    parser.add_argument("--short", action="store_true", help=f"{_SHORT_SAMPLES} questions of a skill")
    parser.add_argument("--seed", type=int, default=1, help="other seeds ask other questions")
    parser.add_argument("--concurrency", type=int, default=8, metavar="N", help="requests at once (default 8)")
    parser.add_argument("--timeout-s", type=float, default=600.0, metavar="S", help="bound of one request")
    parser.add_argument(
        "--metrics",
        action="append",
        default=[],
        metavar="URL",
        help="metrics of a worker, as `baton status` shows them: reports the drafts it accepted (repeatable)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the JSON report to this file")
    return parser


def _skills(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in EVALUATION]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(EVALUATION)}")
    return names


if __name__ == "__main__":
    raise SystemExit(main())
