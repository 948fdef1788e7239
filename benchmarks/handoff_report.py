"""What `benchmarks.handoff` measures, and the numbers it makes of that."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from benchmarks.handoff_limits import Rate
from benchmarks.handoff_rig import BLOCK_TOKENS, Parcel
from kv_transfer.metrics import HandoffReport

_SMALL_TOKENS = 512


class Mode(NamedTuple):
    """One kind of measurement: `rounds` times `concurrent` hand-offs at once."""

    name: str
    tokens: int
    rounds: int
    concurrent: int = 1
    cached_tokens: int = 0
    scattered: bool = False


def modes(tokens: int, repeat: int) -> dict[str, Mode]:
    """Every mode for a context of `tokens`. Concurrent hand-offs share it, so that the volume is the same."""
    small = min(_SMALL_TOKENS, tokens)
    half = tokens // 2 // BLOCK_TOKENS * BLOCK_TOKENS
    listed = [
        Mode("bulk", tokens, repeat),
        Mode("scatter", tokens, repeat, scattered=True),
        Mode("delta", tokens, repeat, cached_tokens=half),
        Mode("small", small, 20 * repeat),
        *(Mode(f"concurrent-{n}", max(BLOCK_TOKENS, tokens // n), repeat, concurrent=n) for n in (8, 32)),
    ]
    return {mode.name: mode for mode in listed}


@dataclass(slots=True)
class Sample:
    """One finished hand-off on the writer's clock."""

    parcel: Parcel
    report: HandoffReport
    started: float
    compute_end: float
    ended: float


@dataclass(slots=True)
class Run:
    """What one mode measured."""

    mode: Mode
    samples: list[Sample] = field(default_factory=list)
    round_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)  # of the writing process, a round
    receiver_cpu_s: list[float] = field(default_factory=list)
    limits: dict[str, list[Rate]] = field(default_factory=dict)  # plain copies, by their kind: one before every round


def summarise(run: Run, received: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The numbers of one mode."""
    mode, reports = run.mode, [sample.report for sample in run.samples]
    far = [received[str(sample.parcel.number)] for sample in run.samples]
    admitted = [end["marks"]["admitted"] - s.compute_end for s, end in zip(run.samples, far, strict=True)]
    exposed = sorted(seconds * 1e3 for seconds in admitted)
    accepted = sorted(report.exposed_s * 1e3 for report in reports)
    round_bytes = sum(report.num_bytes for report in reports) / len(run.round_s)
    rates = [round_bytes / seconds / 1e9 for seconds in run.round_s]
    verify = [end["verify_s"] for end in far]
    commit = [max(0.0, a - r.drain_s - v) for a, r, v in zip(admitted, reports, verify, strict=True)]
    answer = [r.exposed_s - a for a, r in zip(admitted, reports, strict=True)]
    ends = list(zip(run.samples, far, strict=True))
    result: dict[str, Any] = {
        "mode": mode.name,
        "tokens": mode.tokens,
        "cached_tokens": mode.cached_tokens,
        "handoffs": len(reports),
        "bytes": reports[0].num_bytes,
        "exposed_ms_p50": round(statistics.median(exposed), 3),
        "exposed_ms_p99": round(exposed[int(len(exposed) * 0.99)], 3),
        "accepted_ms_p50": round(statistics.median(accepted), 3),
        "accepted_ms_p99": round(accepted[int(len(accepted) * 0.99)], 3),
        "total_ms_p50": round(1e3 * statistics.median(s.ended - s.started for s in run.samples), 3),
        "gb_per_s_best": round(max(rates), 2),
        "gb_per_s_median": round(statistics.median(rates), 2),
        **_plain(rates, run.limits, round_bytes),
        "receiver_cpu_ms_per_gb": round(statistics.mean(run.receiver_cpu_s) * 1e12 / round_bytes, 1),
        "cpu_ms_per_gb": round(statistics.median(run.cpu_s) * 1e12 / round_bytes, 1),
        "stage_ms_p50": {
            "hash": round(1e3 * statistics.median(r.hash_s for r in reports), 3),
            "send": round(1e3 * statistics.median(r.write_s for r in reports), 3),
            "drain": round(1e3 * statistics.median(r.drain_s for r in reports), 3),
            "verify": round(1e3 * statistics.median(verify), 3),
            "commit": round(1e3 * statistics.median(commit), 3),
            "answer": round(1e3 * statistics.median(answer), 3),
        },
        "from_offer_ms_p50": _stages([(s.started, s.report.marks, end["marks"]) for s, end in ends]),
        "from_compute_end_ms_p50": _stages([(s.compute_end, s.report.marks, end["marks"]) for s, end in ends]),
    }
    if mode.concurrent > 1:
        firsts = range(0, len(run.samples), mode.concurrent)
        rounds = [run.samples[first : first + mode.concurrent] for first in firsts]
        result["fairness"] = round(statistics.median(_fairness(samples) for samples in rounds), 3)
    return result


def _plain(rates: Sequence[float], limits: Mapping[str, Sequence[Rate]], round_bytes: float) -> dict[str, float | str]:
    """Every kind of plain copy, and what the hand-offs reached of it; `limit` is the fastest kind."""
    result: dict[str, float | str] = {}
    shares: dict[str, tuple[float, float]] = {}
    for name, measured in limits.items():
        plain = [rate.gb_per_s for rate in measured]
        cpu_s = statistics.median(rate.cpu_s for rate in measured)
        result |= {
            f"{name}_gb_per_s_best": round(max(plain), 2),
            f"{name}_gb_per_s_median": round(statistics.median(plain), 2),
            f"{name}_cpu_ms_per_gb": round(cpu_s * 1e12 / round_bytes, 1),
        }
        of_each = statistics.median(a / b for a, b in zip(rates, plain, strict=True))
        shares[name] = round(max(rates) / max(plain), 3), round(of_each, 3)
    if len(shares) > 1:
        result |= {f"share_of_{name}_median": median for name, (_, median) in shares.items()}
    fastest = min(shares, key=lambda name: shares[name][1])
    best, median = shares[fastest]
    return {**result, "limit": fastest, "share_of_limit_best": best, "share_of_limit_median": median}


def _stages(samples: Sequence[tuple[float, Mapping[str, float], Mapping[str, float]]]) -> dict[str, float]:
    """(origin, the writer's marks, the receiver's): medians of every mark in ms after the origin, in their order."""
    seen: dict[str, list[float]] = {}
    for origin, near, far in samples:
        for end, marks in (("writer", near), ("receiver", far)):
            for stage, at in marks.items():
                seen.setdefault(f"{end}.{stage}", []).append((at - origin) * 1e3)
    medians = {name: round(statistics.median(values), 3) for name, values in seen.items()}
    return dict(sorted(medians.items(), key=lambda item: item[1]))


def _fairness(samples: Sequence[Sample]) -> float:
    """Jain's index over the rates of hand-offs that ran at once: 1 when all were equally fast, 1/n when one had all."""
    rates = [1 / (sample.ended - sample.started) for sample in samples]
    return sum(rates) ** 2 / (len(rates) * sum(rate * rate for rate in rates))
