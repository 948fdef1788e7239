"""What each kernel of a run takes, and results as text."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch.profiler import ProfilerActivity, profile

_SHOWN: Final = 32


def kernel_times(run: Callable[[], object], repeats: int) -> list[dict[str, Any]]:
    """Kernels of a run that does one thing `repeats` times, the longest first: calls and milliseconds of each time."""
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        run()
        torch.accelerator.synchronize()
    calls: dict[str, list[float]] = defaultdict(list)
    for event in recorded.events() or ():
        if event.device_type.name == "CUDA":
            calls[event.name].append(event.device_time)
    spent = sorted(calls.items(), key=lambda item: -sum(item[1]))
    return [
        {
            "kernel": name[:100],
            "calls": round(len(times) / repeats, 1),
            "ms": round(sum(times) / repeats / 1e3, 4),
            "us_a_call": round(sum(times) / len(times), 1),
        }
        for name, times in spent
    ]


def busy_time(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds in which the device does anything during a run, and seconds from its first to its last kernel or copy."""
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        run()
        torch.accelerator.synchronize()
    ranges = sorted(
        (event.time_range.start, event.time_range.end)
        for event in recorded.events() or ()
        if event.device_type.name == "CUDA"
    )
    busy, reached = 0.0, ranges[0][0]
    for start, end in ranges:
        busy += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return busy / 1e6, (reached - ranges[0][0]) / 1e6


def lines_of(result: dict[str, Any]) -> Iterator[str]:
    """A result as text: its numbers, then the kernels if they were recorded."""
    for name, value in result.items():
        if not isinstance(value, list):
            yield f"{name:22}{value}"
            continue
        yield f"{name:22}{sum(row['ms'] for row in value):.3f} ms"
        for row in value[:_SHOWN]:
            yield f"{row['ms']:12.4f} ms {row['calls']:8.1f} x {row['us_a_call']:9.1f} us  {row['kernel']}"
    yield ""
