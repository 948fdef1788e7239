"""A timeline of one hand-off: layers computed, layers pushed, and the control messages at the end.

On a card the compute lane shows when the step thread enqueued a layer, and pushes begin when the card has stored its
rows. Written as Chrome trace format (open it in Perfetto or chrome://tracing) and, beside it, as an SVG picture.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

from kv_transfer.layout import CellMap, CopyPlan, layer_planes, plane_rows
from kv_transfer.link import Copy, LeaseKey, Link, Sent, no_news
from llm_engine.api.handoff import KvLayout

LANES = ("compute", "push", "hand-off")
_COLOURS = {"compute": "#4c78a8", "push": "#f58518", "hand-off": "#54a24b"}


class Span(NamedTuple):
    """Seconds on the monotonic clock."""

    lane: str
    name: str
    start: float
    end: float


class Trace:
    """Spans of one process, from any thread, while `on`."""

    def __init__(self) -> None:
        self.on = False
        self.spans: list[Span] = []

    def add(self, lane: str, name: str, start: float, end: float) -> None:
        """Ignored while the trace is off."""
        if self.on:
            self.spans.append(Span(lane, name, start, end))

    def write(self, path: Path, title: str) -> None:
        """The trace, and the picture under the same name with suffix .svg."""
        origin = min(span.start for span in self.spans)
        events: list[dict[str, Any]] = [
            {"ph": "M", "name": "thread_name", "pid": 1, "tid": lane, "args": {"name": name}}
            for lane, name in enumerate(LANES)
        ]
        events += [
            {
                "ph": "X",
                "name": span.name,
                "pid": 1,
                "tid": LANES.index(span.lane),
                "ts": (span.start - origin) * 1e6,
                "dur": (span.end - span.start) * 1e6,
            }
            for span in self.spans
        ]
        path.write_text(json.dumps({"traceEvents": events, "otherData": {"title": title}}), encoding="utf-8")
        path.with_suffix(".svg").write_text(draw(self.spans, title), encoding="utf-8")


class TracingLink:
    """Wraps a link; says which layers each call moved, and when."""

    def __init__(self, inner: Any, trace: Trace, layout: KvLayout) -> None:
        self.transport: str = inner.transport
        self.confirm: Callable[[LeaseKey], Future[int | None]] = inner.confirm
        self.close: Callable[[], None] = inner.close
        self.mark: Callable[[], Any] = getattr(inner, "mark", lambda: None)
        self._inner = inner
        self._trace = trace
        self._cells = CellMap(layout)
        layer_of = {row: layer for layer, rows in enumerate(layer_planes(layout)) for row in rows}
        self._layer = [layer_of[row] for row in plane_rows(layout)]
        self._threads = threading.local()

    def write(
        self,
        lease: LeaseKey,
        source: memoryview,
        copies: Sequence[Copy],
        stopped: Callable[[], bool],
        sent: Sent = no_news,
    ) -> None:
        """See Link.write."""
        started = time.monotonic()
        self._inner.write(lease, source, copies, stopped, sent)
        layers = [self._layer[self._cells.locate(copy.source, copy.num_bytes).row] for copy in (copies[0], copies[-1])]
        self._add(range(layers[0], layers[1] + 1), started)

    def push(
        self,
        lease: LeaseKey,
        plan: CopyPlan,
        layers: range,
        blocks: tuple[Sequence[int], Sequence[int]],
        ready: Any,
        stopped: Callable[[], bool],
    ) -> int:
        """See CudaIpcLink.push; the span ends with `finish`, and begins when the card has computed the layers."""
        if blocks[0]:
            self._of_thread().append((layers, ready))
        return int(self._inner.push(lease, plan, layers, blocks, ready, stopped))

    def finish(self, mark: Any = None) -> None:
        """See CudaIpcLink.finish; slices end in the order of their pushes."""
        pushed = self._of_thread()
        ending = [pushed.popleft() for _ in range(min(len(pushed), 1 if mark is not None else len(pushed)))]
        for _, ready in ending:
            if ready is not None:
                ready.synchronize()
        started = time.monotonic()
        self._inner.finish(mark)
        for layers, _ in ending:
            self._add(layers, started)

    def _of_thread(self) -> deque[tuple[range, Any]]:
        if not hasattr(self._threads, "pushed"):
            self._threads.pushed = deque()
        pushed: deque[tuple[range, Any]] = self._threads.pushed
        return pushed

    def _add(self, layers: range, started: float) -> None:
        which = f"{layers.start}" if len(layers) == 1 else f"{layers.start} to {layers.stop - 1}"
        self._trace.add("push", f"layer {which}", started, time.monotonic())


def wrap(trace: Trace, layout: KvLayout) -> Callable[[Link], Link]:
    """For HandoffClient."""
    return lambda link: TracingLink(link, trace, layout)


def draw(spans: Sequence[Span], title: str, width: int = 1100) -> str:
    """The picture: a lane each for compute, pushes and control, over milliseconds."""
    origin, end = min(span.start for span in spans), max(span.end for span in spans)
    left, top, lane_height, gap = 84, 44, 34, 14
    scale = (width - left - 20) / (end - origin)
    height = top + len(LANES) * (lane_height + gap) + 34
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="{left}" y="22" font-size="14">{escape(title)}</text>',
    ]
    for index, lane in enumerate(LANES):
        y = top + index * (lane_height + gap)
        parts.append(f'<text x="8" y="{y + 21}">{lane}</text>')
        for span in spans:
            if span.lane == lane:
                x, wide = left + (span.start - origin) * scale, max(0.6, (span.end - span.start) * scale)
                style = f'height="{lane_height}" fill="{_COLOURS[lane]}"'
                style += ' stroke="#ffffff" stroke-width="0.5"' if wide > 4 else ""
                ms = (span.end - span.start) * 1e3
                parts.append(
                    f'<rect x="{x:.1f}" y="{y}" width="{wide:.1f}" {style}>'
                    f"<title>{escape(span.name)}: {ms:.2f} ms</title></rect>"
                )
    base = top + len(LANES) * (lane_height + gap)
    step = _step((end - origin) * 1e3)
    for number in range(int((end - origin) * 1e3 / step) + 1):
        x = left + number * step / 1e3 * scale
        parts.append(f'<line x1="{x:.1f}" y1="{top - 8}" x2="{x:.1f}" y2="{base}" stroke="#dddddd"/>')
        parts.append(f'<text x="{x:.1f}" y="{base + 16}" text-anchor="middle">{number * step:g} ms</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _step(total_ms: float) -> float:
    """A round distance between marks, for about ten of them."""
    step = 1e-3
    while total_ms / step > 12:
        step *= 2 if str(step).lstrip("0.")[0] in "15" else 2.5
    return step
