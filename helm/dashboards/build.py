"""Write the Grafana dashboards beside this file: `python helm/dashboards/build.py`, after a change here.

Series carry `cluster_name` and, for workers, `pool` and `pod`; the chart's monitors set them. Router series have no
`pool`: `pool=""` tells them from a worker's series of the same name.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

DIRECTORY = Path(__file__).parent
OWN = 'cluster_name=~"$cluster"'
PODS = f'{OWN},pool=~"$pool",pod=~"$pod"'
WINDOW = "[$__rate_interval]"
WIDTH = 24
ROW_HEIGHT = 8
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
SOURCE = {"type": "prometheus", "uid": "${datasource}"}

Panel = dict[str, Any]


def rate(metric: str, selector: str = OWN) -> str:
    """Events a second of each series."""
    return f"rate({metric}{{{selector}}}{WINDOW})"


def total(metric: str, selector: str = OWN, by: str = "") -> str:
    """Events a second, summed."""
    return f"sum by ({by}) ({rate(metric, selector)})" if by else f"sum({rate(metric, selector)})"


def quantile(metric: str, q: float, selector: str = OWN, by: str = "") -> str:
    """Of a histogram, over all its series or by label."""
    groups = f"le, {by}" if by else "le"
    return f"histogram_quantile({q}, sum by ({groups}) ({rate(f'{metric}_bucket', selector)}))"


def percentiles(metric: str, selector: str = OWN) -> dict[str, str]:
    """Legend → expression."""
    return {name: quantile(metric, q, selector) for name, q in QUANTILES.items()}


def panel(kind: str, title: str, unit: str, queries: dict[str, str], text: str, width: int, **custom: Any) -> Panel:
    """A panel without its place. `queries`: legend → expression."""
    defaults: dict[str, Any] = {"unit": unit, "min": 0}
    if custom:
        defaults["custom"] = custom
    panel: Panel = {
        "type": kind,
        "title": title,
        "description": text,
        "datasource": SOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + i), "datasource": SOURCE, "expr": expr, "legendFormat": legend}
            for i, (legend, expr) in enumerate(queries.items())
        ],
        "gridPos": {"w": width, "h": ROW_HEIGHT if kind != "stat" else 4},
    }
    if kind == "timeseries":
        panel["options"] = {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
    elif kind == "stat":
        panel["options"] = {
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
            "colorMode": "none",
            "graphMode": "area",
            "justifyMode": "auto",
            "orientation": "auto",
            "textMode": "auto",
        }
    return panel


def lines(title: str, unit: str, queries: dict[str, str], text: str = "", width: int = 8) -> Panel:
    """Curves over time."""
    return panel("timeseries", title, unit, queries, text, width, lineWidth=1, fillOpacity=0)


def stack(title: str, unit: str, queries: dict[str, str], text: str = "", width: int = 8) -> Panel:
    """Curves on top of each other."""
    stacking = {"mode": "normal", "group": "A"}
    return panel("timeseries", title, unit, queries, text, width, lineWidth=1, fillOpacity=40, stacking=stacking)


def number(title: str, unit: str, expr: str, text: str = "", width: int = 4) -> Panel:
    """The latest value."""
    return panel("stat", title, unit, {title: expr}, text, width)


def variable(name: str, metric: str, label: str) -> dict[str, Any]:
    """A choice of label values; several at once, or all."""
    query = f"label_values({metric}, {label})"
    return {
        "type": "query",
        "name": name,
        "label": name.capitalize(),
        "datasource": SOURCE,
        "definition": query,
        "query": query,
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
        "options": [],
        "hide": 0,
        "skipUrlSync": False,
        "regex": "",
    }


def dashboard(name: str, title: str, panels: list[Panel], *, pods: bool = False) -> dict[str, Any]:
    """Panels laid out from left to right, row by row."""
    x = y = height = 0
    placed = []
    for number_, one in enumerate(panels, 1):
        place = one["gridPos"]
        if x + place["w"] > WIDTH:
            x, y, height = 0, y + height, 0
        placed.append({**one, "id": number_, "gridPos": {**place, "x": x, "y": y}})
        x, height = x + place["w"], max(height, place["h"])
    source = {"type": "datasource", "name": "datasource", "label": "Data source", "query": "prometheus", "refresh": 1}
    choices: list[dict[str, Any]] = [
        {**source, "hide": 0, "regex": "", "skipUrlSync": False, "multi": False, "includeAll": False, "options": []},
        variable("cluster", "baton_ttft_seconds_count" if not pods else "baton_worker_info", "cluster_name"),
    ]
    if pods:
        choices.append(variable("pool", f"baton_worker_info{{{OWN}}}", "pool"))
        choices.append(variable("pod", f'baton_worker_info{{{OWN},pool=~"$pool"}}', "pod"))
    return {
        "uid": f"baton-{name}",
        "title": title,
        "tags": ["baton"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timepicker": {},
        "timezone": "",
        "annotations": {"list": []},
        "templating": {"list": choices},
        "links": [
            {
                "type": "dashboards",
                "title": "Baton",
                "tags": ["baton"],
                "asDropdown": True,
                "includeVars": True,
                "keepTime": True,
                "targetBlank": False,
                "icon": "external link",
                "tooltip": "",
                "url": "",
            }
        ],
        "panels": placed,
    }


def overview() -> dict[str, Any]:
    """Latencies, goodput, pools: the page to leave open."""
    requests = "baton_requests_total"
    good = f'{OWN},outcome=~"stop|length"'
    return dashboard(
        "overview",
        "Baton / Overview",
        [
            number("Requests/s", "reqps", total(requests)),
            number("Output tokens/s", "short", total("baton_tokens_total", f'{OWN},pool="",direction="out"')),
            number(
                "Complete", "percentunit", f"{total(requests, good)} / {total(requests)}", "Ended by stop or length"
            ),
            number("TTFT p90", "s", quantile("baton_ttft_seconds", 0.9)),
            number("TPOT p90", "s", quantile("baton_tpot_seconds", 0.9)),
            number("In flight", "short", f"sum(baton_inflight_requests{{{OWN}}})"),
            lines("Time to first token", "s", percentiles("baton_ttft_seconds"), "HTTP request to first chunk written"),
            lines(
                "Time per output token", "s", percentiles("baton_tpot_seconds"), "Mean of a request, after its first"
            ),
            lines("Between tokens", "s", percentiles("baton_inter_token_seconds"), "Single gaps: stalls show here"),
            stack(
                "Where the time to first token goes",
                "s",
                {
                    "{{stage}}": f"{total('baton_ttft_stage_seconds_sum', by='stage')}"
                    f" / on () group_left () {total('baton_ttft_seconds_count')}"
                },
                "Mean per request; the stages add up to the time to first token",
                12,
            ),
            lines("End to end", "s", percentiles("baton_e2e_seconds"), width=12),
            lines(
                "Pools",
                "short",
                {
                    "{{pool}} wanted": f"max by (pool) (baton_pool_desired_replicas{{{OWN}}})",
                    "{{pool}} ready": f"max by (pool) (baton_pool_ready_replicas{{{OWN}}})",
                    "{{pool}} recommended": f"max by (pool) (baton_pool_recommended_replicas{{{OWN}}})",
                },
                "Recommended: by the autoscaler, in the modes `recommend` and `act`",
            ),
            stack("Requests by end", "reqps", {"{{outcome}}": total(requests, by="outcome")}),
            stack(
                "Waiting",
                "short",
                {
                    "router queue": f"sum(baton_queued_requests{{{OWN}}})",
                    "recovering": f"sum(baton_recovering_requests{{{OWN}}})",
                    "prefill queue": f"sum(baton_queue_depth{{{OWN}}})",
                },
            ),
            lines("Refused", "reqps", {"{{reason}}": total("baton_refusals_total", f'{OWN},pool=""', "reason")}),
            lines("Started again", "reqps", {"{{cause}}": total("baton_recoveries_total", by="cause")}),
            lines(
                "HTTP", "reqps", {"{{route}} {{status}}": total("baton_http_request_seconds_count", by="route, status")}
            ),
        ],
    )


def handoff() -> dict[str, Any]:
    """The way of a cache from prefill to decode."""
    routers = f'{OWN},pool=""'
    decode = f'{OWN},pool!=""'
    moved, count = total("baton_handoff_bytes_total", routers), total("baton_handoff_seconds_count", routers)
    return dashboard(
        "handoff",
        "Baton / Hand-off",
        [
            lines(
                "Exposed latency",
                "s",
                percentiles("baton_handoff_exposed_seconds", routers),
                "End of the last prefill kernel until decode may schedule: what the hand-off adds to a stream",
            ),
            lines("Whole hand-off", "s", percentiles("baton_handoff_seconds", routers), "Offer to verified commit"),
            lines("Bytes", "Bps", {"handed over": total("baton_handoff_bytes_total", routers)}),
            lines("Hand-offs", "ops", {"committed": total("baton_handoff_seconds_count", routers)}),
            lines(
                "Bytes per hand-off",
                "bytes",
                {
                    "mean": f"{moved} / {count}",
                },
            ),
            lines(
                "Failures", "ops", {"{{pool}} {{cause}}": total("baton_handoff_failures_total", decode, "pool, cause")}
            ),
            lines("Open hand-offs", "short", {"{{pod}}": f"sum by (pod) (baton_pending_handoffs{{{OWN}}})"}),
            lines(
                "Blocks under lease or in quarantine",
                "short",
                {"{{state}}": f'sum by (state) (baton_blocks{{{OWN},state=~"leased|quarantined"}})'},
                "Quarantine only shrinks when a writer is proven to have stopped",
            ),
            lines(
                "Lost workers", "short", {"{{role}} {{cause}}": total("baton_worker_losses_total", by="role, cause")}
            ),
        ],
    )


def caches() -> dict[str, Any]:
    """Prefix hits and blocks."""
    workers = f'{OWN},pool!=""'
    prompts = total("baton_tokens_total", f'{OWN},direction="in",pool!="",pool!="decode"')
    hits = "baton_prefix_hit_tokens_total"
    return dashboard(
        "caches",
        "Baton / Caches",
        [
            lines(
                "Prompt tokens found in a cache",
                "percentunit",
                {
                    "{{tier}}": f"{total(hits, workers, 'tier')} / on () group_left () {prompts}",
                },
                "Share of the prompt tokens that prefill accepted",
            ),
            lines("Hits", "short", {"{{pool}} {{tier}}": total(hits, workers, "pool, tier")}, "Tokens a second"),
            lines(
                "Computed",
                "short",
                {"{{pool}}": total("baton_prefill_computed_tokens_total", by="pool")},
                "Tokens a second",
            ),
            *(
                stack(
                    f"Blocks of {pool}", "short", {"{{state}}": f'sum by (state) (baton_blocks{{{OWN},pool="{pool}"}})'}
                )
                for pool in ("prefill", "decode")
            ),
            lines(
                "Blocks that can be had",
                "percentunit",
                {
                    "{{pool}}": f'sum by (pool) (baton_blocks{{{workers},state=~"free|cached"}})'
                    f" / sum by (pool) (baton_blocks{{{workers}}})"
                },
                "Free, or cached and evictable",
            ),
            lines("Evictions", "short", {"{{pool}}": total("baton_evictions_total", by="pool")}, "Blocks a second"),
            lines("Preemptions", "ops", {"{{pool}}": total("baton_preemptions_total", by="pool")}),
        ],
    )


def speculation() -> dict[str, Any]:
    """Drafts and engine steps."""
    decode = f'{OWN},pool!=""'
    drafts, accepted = "baton_draft_tokens_total", "baton_accepted_tokens_total"
    share = {"draft {{position}}": f"{total(accepted, decode, 'position')} / {total(drafts, decode, 'position')}"}
    output = total("baton_tokens_total", f'{decode},direction="out"')
    saved = f"{total(accepted, decode)} / {output}"
    return dashboard(
        "speculation",
        "Baton / Speculation and steps",
        [
            lines("Drafts accepted, by position", "percentunit", share),
            lines("Share of tokens that were drafts", "percentunit", {"of output": saved}, "Steps saved"),
            lines("Drafts verified", "short", {"draft {{position}}": total(drafts, decode, "position")}, "A second"),
            lines(
                "Step time p50 and p99",
                "s",
                {
                    f"{{{{kind}}}} {name}": quantile("baton_step_seconds", q, decode, "kind")
                    for name, q in (("p50", 0.5), ("p99", 0.99))
                },
                width=12,
            ),
            lines("Steps", "ops", {"{{kind}}": total("baton_step_seconds_count", decode, "kind")}, width=12),
        ],
    )


def workers() -> dict[str, Any]:
    """Every pod."""

    def each(metric: str, more: str = "") -> dict[str, str]:
        return {"{{pod}}": f"sum by (pod) ({metric}{{{PODS}{more}}})"}

    return dashboard(
        "workers",
        "Baton / Workers",
        [
            number("Healthy", "short", f"sum(baton_healthy{{{PODS}}})"),
            number("Draining", "short", f"sum(baton_draining{{{PODS}}})"),
            number("Restarts", "short", f"sum(baton_worker_restarts_total{{{OWN}}})", "Of the workers that exist now"),
            number("Revisions", "short", f"count(count by (format_id, weight_version) (baton_worker_info{{{PODS}}}))"),
            lines(
                "Workers by state",
                "short",
                {"{{pool}} {{state}}": f"sum by (pool, state) (baton_pool_workers{{{OWN}}})"},
            ),
            lines("Running sequences", "short", each("baton_running_sequences")),
            lines("Waiting requests", "short", each("baton_queue_depth")),
            lines("Tokens still to prefill", "short", each("baton_waiting_tokens")),
            lines(
                "Output tokens",
                "short",
                {"{{pod}}": total("baton_tokens_total", f'{PODS},direction="out"', "pod")},
                "A second",
            ),
            lines("Time in steps", "percentunit", {"{{pod}}": total("baton_step_seconds_sum", PODS, "pod")}),
            lines("Blocks that can be had", "short", each("baton_blocks", ',state=~"free|cached"')),
            lines("Since the last progress", "s", each("baton_step_age_seconds")),
            lines("Open hand-offs", "short", each("baton_pending_handoffs")),
            lines(
                "Dropped frames", "ops", {"{{pod}} {{cause}}": total("baton_rejected_frames_total", PODS, "pod, cause")}
            ),
            lines("Routers' event loops", "s", {"{{pod}}": f"max by (pod) (baton_event_loop_lag_seconds{{{OWN}}})"}),
            lines(
                "Workers as routers see them",
                "short",
                {"{{pod}} {{role}} {{state}}": f"sum by (pod, role, state) (baton_router_workers{{{OWN}}}) > 0"},
            ),
        ],
        pods=True,
    )


def build() -> dict[str, str]:
    """File name → content."""
    made = {"overview": overview, "handoff": handoff, "caches": caches, "speculation": speculation, "workers": workers}
    return {f"{name}.json": json.dumps(make(), indent=1) + "\n" for name, make in made.items()}


if __name__ == "__main__":
    for name, content in build().items():
        (DIRECTORY / name).write_text(content, encoding="utf-8")
    print(f"dashboards written to {DIRECTORY}", file=sys.stderr)
