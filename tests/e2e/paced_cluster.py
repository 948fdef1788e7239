"""The autoscaler on a live cluster of paced workers, under a replayed trace.

    python -m tests.e2e.paced_cluster step|mixes MODEL DIRECTORY

Runs on a host of its own. Writes what it saw to DIRECTORY/seen.json; the test judges it.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.loadgen import Outcome, run_open_loop
from benchmarks.traces import read_mooncake, to_jobs
from deploy import local_ray
from deploy.control import ClusterStatus, ControlClient, ControlTimeout, GetStatus
from deploy.rundir import RunDir
from llm_engine.api.config import ClusterConfig, build
from tests.e2e.paced import PacedController

URL = "http://127.0.0.1:8000"
START_S = 120.0
SAMPLE_S = 0.25
CALM_S, LOADED_S = 12.0, 60.0  # of the step: how long the trace is calm, and how long it is ten times as dense
RATE = 1.0  # requests per second while it is calm
STEP = 10.0
PROMPT, OUTPUT = 190, 32  # tokens: about 0.2 s of a prefill worker and 0.8 s of a place of a decode worker
PLACES = 4  # of a worker
MAX = 4  # workers of a pool
SETTINGS: dict[str, Any] = {
    "mode": "act",
    "period_s": 1.0,
    "window_s": 6.0,
    "up_after_s": 2.0,
    "down_after_s": 600.0,
    "cooldown_s": 5.0,
    "ttft_slo_s": 2.0,
    "tpot_slo_s": 0.2,
}


def configuration(model: str, pools: int, **autoscaler: Any) -> ClusterConfig:
    """A cluster of `pools` workers in each pool."""
    pool = {"replicas": pools, "min_replicas": 1, "max_replicas": MAX}
    return build(
        {
            "model": {"path": model, "name": "nano"},
            "kv": {"memory_mb": 16},
            "engine": {"num_drafts": 0},
            "scheduler": {"max_num_seqs": PLACES},
            "router": {"max_inflight": 4096, "queue_timeout_s": 120.0},
            "pools": {"prefill": pool, "decode": pool},
            "autoscaler": {**SETTINGS, **autoscaler},
        }
    )


def write_trace(path: Path, parts: Sequence[tuple[float, float, int, int]], seed: int = 1) -> None:
    """Poisson arrivals as a Mooncake trace: parts of (seconds, requests per second, prompt, output tokens)."""
    draw, now, rows = random.Random(seed), 0.0, []
    end = 0.0
    for seconds, rate, prompt, output in parts:
        end += seconds
        while (now := now + draw.expovariate(rate)) < end:
            row = {"timestamp": int(now * 1e3), "input_length": int(prompt * draw.uniform(0.7, 1.3))}
            rows.append({**row, "output_length": output, "hash_ids": []})
        now = end
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


class Cluster:
    """Ray, controller, router and workers; `samples` is what the controller said, (seconds, status)."""

    def __init__(self, config: ClusterConfig, directory: Path) -> None:
        self.run_dir = RunDir(directory / "run")
        self.run_dir.acquire()
        self.samples: list[tuple[float, ClusterStatus]] = []
        self._ray_dir = Path(tempfile.mkdtemp(prefix="baton-", dir="/tmp"))
        local_ray.set_environment(self.run_dir.create_secret(), self._ray_dir)
        local_ray.start(self._ray_dir)
        self._controller = local_ray.start_controller(config, self.run_dir.path, PacedController)

    def status(self) -> ClusterStatus | None:
        if self._controller.done():
            self._controller.result()
        record = self.run_dir.control()
        if record is None:
            return None
        try:
            with ControlClient(record.control_addr, self.run_dir.key()) as client:
                return client.ask(GetStatus(), timeout_s=2.0)
        except ControlTimeout:
            return None

    def wait_ready(self) -> None:
        deadline = time.monotonic() + START_S
        while (now := self.status()) is None or not now.ready:
            if time.monotonic() > deadline:
                raise TimeoutError(str(now))
            time.sleep(SAMPLE_S)

    def replay(self, trace: Path) -> list[Outcome]:
        """Send the trace as it was recorded, and sample the controller meanwhile."""
        rows = read_mooncake(trace, 1 << 20)
        jobs = to_jobs(rows, time_scale=1.0, length_scale=1.0, vocab=range(3, 259), max_len=1024, seed=1)
        first = rows[0].timestamp / 1e3  # jobs count from the first row
        with self._sampled(first):
            return asyncio.run(run_open_loop(URL, "nano", jobs, timeout_s=120.0, on_done=lambda _: None))

    @contextmanager
    def _sampled(self, first: float) -> Iterator[None]:
        begun, over = time.monotonic() - first, threading.Event()

        def sample() -> None:
            while not over.wait(SAMPLE_S):
                if (now := self.status()) is not None:
                    self.samples.append((time.monotonic() - begun, now))

        thread = threading.Thread(target=sample)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def close(self) -> None:
        local_ray.stop()
        shutil.rmtree(self._ray_dir, ignore_errors=True)


def step(cluster: Cluster, directory: Path) -> dict[str, Any]:
    """A trace that becomes ten times as dense at CALM_S."""
    trace = directory / "trace.jsonl"
    parts = [(CALM_S, RATE, PROMPT, OUTPUT), (LOADED_S, STEP * RATE, PROMPT, OUTPUT)]
    write_trace(trace, parts)
    arrivals = [row.timestamp / 1e3 for row in read_mooncake(trace, 1 << 20)]
    outcomes = cluster.replay(trace)
    pools = [
        (round(at, 2), {name: (pool.desired, pool.ready) for name, pool in now.pools.items()})
        for at, now in cluster.samples
    ]
    return {
        "errors": [outcome.error for outcome in outcomes if outcome.error],
        "ttft_s": [(at, round(outcome.ttft_s, 3)) for at, outcome in zip(arrivals, outcomes, strict=True)],
        "pools": [entry for i, entry in enumerate(pools) if i == 0 or entry[1] != pools[i - 1][1]],
        "changes": [(c.pool, c.before, c.after, c.by, c.reason) for c in cluster.samples[-1][1].changes],
    }


MIXES = {  # requests per second, prompt tokens, output tokens
    "prefill": (6.0, 360, 8),
    "decode": (8.0, 20, 60),
}


def mixes(cluster: Cluster, directory: Path) -> dict[str, Any]:
    """What the autoscaler would do with a full budget under two mixes, one after the other."""
    seen: dict[str, Any] = {"errors": []}
    for name, (rate, prompt, output) in MIXES.items():
        trace = directory / f"{name}.jsonl"
        write_trace(trace, [(25.0, rate, prompt, output)])
        cluster.samples.clear()
        outcomes = cluster.replay(trace)
        seen["errors"] += [outcome.error for outcome in outcomes if outcome.error]
        late = [now for at, now in cluster.samples if 18.0 < at < 25.0]
        seen[name] = [{pool: found.recommended for pool, found in now.pools.items()} for now in late]
        seen[f"{name}_reasons"] = {pool: found.reason for pool, found in late[-1].pools.items()}
        seen[f"{name}_sizes"] = {pool: found.desired for pool, found in late[-1].pools.items()}
        time.sleep(SETTINGS["window_s"] + 2.0)  # the next mix is judged by itself
    return seen


def main(scenario: str, model: str, where: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    directory = Path(where)
    config = configuration(model, 1) if scenario == "step" else configuration(model, 2, mode="recommend", max_cards=4)
    cluster = Cluster(config, directory)
    try:
        cluster.wait_ready()
        seen = (step if scenario == "step" else mixes)(cluster, directory)
    finally:
        cluster.close()
    (directory / "seen.json").write_text(json.dumps(seen), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
