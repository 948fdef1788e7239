"""What the comparisons with other engines share: equal prompts, a Baton cluster of plain processes, one closed loop."""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.loadgen import Job, run_closed_loop, served_model
from deploy.processes import ProcessCluster


def make_jobs(count: int, input_len: int, output_len: int, seed: int) -> list[Job]:
    """Greedy jobs of fixed lengths over byte tokens."""
    rng = random.Random(seed)
    return [Job(prompt=rng.choices(range(3, 259), k=input_len), max_tokens=output_len) for _ in range(count)]


def closed_loop(url: str, jobs: Sequence[Job], concurrency: int, timeout_s: float = 600.0) -> dict[str, float]:
    """Output tokens per second and median TTFT and TPOT of one run. Raises RuntimeError when a request failed."""

    async def run() -> dict[str, float]:
        model = await served_model(url)
        start = time.perf_counter()
        outcomes = await run_closed_loop(
            url, model, jobs, concurrency=concurrency, timeout_s=timeout_s, on_done=lambda _: None
        )
        wall_s = time.perf_counter() - start
        failed = [o.error for o in outcomes if o.error]
        if failed:
            raise RuntimeError(f"{len(failed)} of {len(jobs)} requests failed at {url}: {failed[0]}")
        ttft, tpot = sorted(o.ttft_s for o in outcomes), sorted(o.tpot_s for o in outcomes)
        return {
            "output_tokens_per_s": round(sum(o.output_tokens for o in outcomes) / wall_s, 1),
            "ttft_p50_ms": round(ttft[len(ttft) // 2] * 1e3, 2),
            "tpot_p50_ms": round(tpot[len(tpot) // 2] * 1e3, 3),
        }

    return asyncio.run(run())


@contextmanager
def baton(settings: Mapping[str, Any], warm_up: Sequence[Job], *, aggregated: bool) -> Iterator[str]:
    """A fresh cluster (one prefill and one decode worker, or one aggregated) that has answered; yields its address."""
    split = int(not aggregated)
    with (
        tempfile.TemporaryDirectory(prefix="baton-bench-") as run_dir,
        ProcessCluster(Path(run_dir), settings, prefill=split, decode=split, aggregated=1 - split) as cluster,
    ):
        closed_loop(cluster.url, [Job(prompt=job.prompt[::-1], max_tokens=job.max_tokens) for job in warm_up], 4)
        yield cluster.url
