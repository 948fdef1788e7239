"""Turns client outcomes and scraped metrics into one report, as a table or as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from benchmarks.loadgen import Outcome
from benchmarks.machine import machine

QUANTILES = (50, 90, 99)


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p90, p99 and mean in milliseconds of `values` in seconds; empty input gives an empty dict."""
    if not values:
        return {}
    data = np.asarray(values) * 1e3
    result = {f"p{q}": round(float(np.percentile(data, q)), 3) for q in QUANTILES}
    return result | {"mean": round(float(data.mean()), 3)}


def summarise(
    outcomes: Sequence[Outcome], wall_s: float, *, slo_ttft_ms: float, slo_tpot_ms: float, before: str, after: str
) -> dict[str, Any]:
    """The report. `before`, `after`: metrics scraped around the run. Goodput counts requests within both SLOs."""
    good = [o for o in outcomes if not o.error]
    within = [o for o in good if o.ttft_s * 1e3 <= slo_ttft_ms and o.tpot_s * 1e3 <= slo_tpot_ms]
    prompt_tokens = sum(o.input_tokens for o in good)
    return {
        "machine": machine(),
        "requests": len(outcomes),
        "errors": len(outcomes) - len(good),
        "first_error": next((o.error for o in outcomes if o.error), ""),
        "wall_s": round(wall_s, 3),
        "input_tokens": prompt_tokens,
        "output_tokens": sum(o.output_tokens for o in good),
        "output_tokens_per_s": round(sum(o.output_tokens for o in good) / wall_s, 1),
        "requests_per_s": round(len(good) / wall_s, 2),
        "prefix_hit_ratio": round(sum(o.cached_tokens for o in good) / prompt_tokens, 4) if prompt_tokens else 0.0,
        "ttft_ms": percentiles([o.ttft_s for o in good]),
        "tpot_ms": percentiles([o.tpot_s for o in good if o.output_tokens > 1]),
        "itl_ms": percentiles([gap for o in good for gap in o.itl_s]),
        "e2e_ms": percentiles([o.e2e_s for o in good]),
        "handoff": handoff_delta(before, after),
        "slo": {"ttft_ms": slo_ttft_ms, "tpot_ms": slo_tpot_ms},
        "goodput_ratio": round(len(within) / len(outcomes), 4) if outcomes else 0.0,
        "goodput_requests_per_s": round(len(within) / wall_s, 2),
    }


def handoff_delta(before: str, after: str) -> dict[str, float]:
    """Mean exposed and total hand-off latency, bytes and count between two scrapes of the router's metrics."""
    old, new = _samples(before), _samples(after)

    def grown(name: str) -> float:
        return new.get(name, 0.0) - old.get(name, 0.0)

    count = grown("baton_handoff_seconds_count")
    if not count:
        return {"count": 0.0}
    return {
        "count": count,
        "exposed_mean_ms": round(grown("baton_handoff_exposed_seconds_sum") / count * 1e3, 3),
        "total_mean_ms": round(grown("baton_handoff_seconds_sum") / count * 1e3, 3),
        "bytes": grown("baton_handoff_bytes_total"),
    }


def show(report: dict[str, Any], as_json: bool) -> None:
    """Print the report to stdout."""
    if as_json:
        print(json.dumps(report, indent=2))
        return
    table = Table(title=f"{report['requests']} requests, {report['errors']} errors, {report['wall_s']} s")
    for column in ("", "p50", "p90", "p99", "mean"):
        table.add_column(column, justify="right")
    for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"):
        table.add_row(name, *(str(report[name].get(key, "-")) for key in ("p50", "p90", "p99", "mean")))
    console = Console()
    console.print(table)
    for key in ("output_tokens_per_s", "requests_per_s", "prefix_hit_ratio", "handoff", "goodput_ratio", "machine"):
        console.print(f"{key}: {report[key]}")
    if report["first_error"]:
        console.print(f"first error: {report['first_error']}", markup=False)


def _samples(text: str) -> dict[str, float]:
    totals: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
    return totals
