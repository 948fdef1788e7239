"""Baton against vLLM's CPU engine on one V3-style checkpoint, in one run.

`python -m benchmarks.versus_vllm --vllm-python VENV/bin/python`, where VENV holds vLLM built for CPU. Both serve bf16
on the same cores over HTTP. Both servers are up, and the same closed loop runs at 1, 8 and 32 streams against one and
then the other, in several rounds: a shared machine is faster at one time than at another, and a ratio of neighbours
is not. Reported is the median round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from benchmarks.machine import machine
from benchmarks.versus import baton, closed_loop, make_jobs
from deploy.processes import free_port

START_TIMEOUT_S = 180.0

Round = dict[str, dict[str, float]]  # engine → figures of one closed loop


@contextmanager
def vllm_server(python: Path, model_dir: Path, log: Path) -> Iterator[str]:
    """A vLLM server on loopback; yields its base address. Raises RuntimeError when it does not start in time."""
    port = free_port()
    env = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(os.cpu_count() or 1),
        "GLOO_SOCKET_IFNAME": "lo",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_NO_USAGE_STATS": "1",
        "PATH": f"{python.parent}:{os.environ['PATH']}",
    }
    command = [str(python.parent / "vllm"), "serve", str(model_dir), "--dtype", "bfloat16", "--enforce-eager"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "1024", "--no-enable-prefix-caching"]
    with log.open("wb") as sink, subprocess.Popen(command, stdout=sink, stderr=sink, env=env) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_healthy(url, process, log)
            yield url
        finally:
            process.terminate()


def _wait_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    with httpx.Client(trust_env=False, timeout=2.0) as client:
        while time.monotonic() < deadline and process.poll() is None:
            try:
                if client.get(f"{url}/health").status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.5)
    raise RuntimeError(f"vLLM did not start: {log.read_text(errors='replace')[-2000:]}")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 1 when a level is behind."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.versus_vllm", description=__doc__)
    parser.add_argument("--vllm-python", type=Path, required=True, help="interpreter of a venv with vLLM for CPU")
    parser.add_argument("--model", type=Path, help="V3-style checkpoint (default: the 35 M `bench`, made on the fly)")
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests-per-stream", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="threads of Baton's worker")
    parser.add_argument("--numerics", choices=("exact", "fast"), default="fast")
    parser.add_argument("--step-tokens", type=int, default=1024, help="prefill rows of one step; vLLM takes 2048")
    parser.add_argument("--drafts", type=int, default=0)
    parser.add_argument("--disaggregated", action="store_true", help="prefill and decode workers instead of one")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="baton-versus-") as scratch:
        report = compare(args, args.model or _bench(Path(scratch)), Path(scratch))
    print(json.dumps(report, indent=2))
    return 0 if min(level["ratio"] for level in report["levels"].values()) > 1.0 else 1


def compare(args: argparse.Namespace, model_dir: Path, scratch: Path) -> dict[str, Any]:
    """Both engines at every level, and the ratio of their output tokens per second."""
    levels = {n: make_jobs(n * args.requests_per_stream, args.input_len, args.output_len, seed=n) for n in args.streams}
    settings = {
        "model.path": str(model_dir),
        "engine.dtype": "bf16",
        "engine.numerics": args.numerics,
        "engine.num_drafts": args.drafts,
        "engine.threads": args.threads,
        "kv.prefix_cache": False,
        "scheduler.max_step_tokens": args.step_tokens,
    }
    rounds: dict[int, list[Round]] = {level: [] for level in levels}
    warm_up = levels[args.streams[0]][:4]
    with (
        baton(settings, warm_up, aggregated=not args.disaggregated) as ours,
        vllm_server(args.vllm_python, model_dir, scratch / "vllm.log") as theirs,
    ):
        closed_loop(theirs, warm_up, 4)
        for number in range(args.rounds):
            for level, jobs in levels.items():
                first, second = (ours, theirs) if number % 2 == 0 else (theirs, ours)
                results = {url: closed_loop(url, jobs, level) for url in (first, second)}
                rounds[level].append({"baton": results[ours], "vllm": results[theirs]})
                print(f"round {number + 1}, {level} streams: {_ratio(rounds[level][-1]):.2f}", file=sys.stderr)
    return {
        "machine": machine(),
        "settings": {key: value for key, value in settings.items() if key != "model.path"},
        "levels": {level: summary(results) for level, results in rounds.items()},
    }


def summary(rounds: Sequence[Round]) -> dict[str, Any]:
    """The median ratio, all ratios in the order of the rounds, and each engine's median figures."""
    ratios = [round(_ratio(results), 2) for results in rounds]
    engines = {
        engine: {key: statistics.median(results[engine][key] for results in rounds) for key in rounds[0][engine]}
        for engine in ("baton", "vllm")
    }
    return {"ratio": statistics.median(ratios), "ratios": ratios, **engines}


def _ratio(results: Round) -> float:
    return results["baton"]["output_tokens_per_s"] / results["vllm"]["output_tokens_per_s"]


def _bench(directory: Path) -> Path:
    from llm_engine.models.synthetic import make_checkpoint

    make_checkpoint("bench", directory / "bench", dtype="bf16")
    return directory / "bench"


if __name__ == "__main__":
    raise SystemExit(main())
