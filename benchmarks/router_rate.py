"""What the router costs: requests per second, its share of TTFT, relayed tokens per second, gaps in a stream.

`python -m benchmarks.router_rate [--sglang-python VENV/bin/python] [--rounds 3]`. For requests per second and TTFT the
workers cost next to nothing: stubs that answer over the request plane, the HTTP twin for sglang-router. Relayed tokens
and gaps are measured with fakes that decode step by step. Load comes from `wrk`. Everything shares the machine's cores,
so both routers take turns, `--rounds` times.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from benchmarks.added_ttft import added_ttft
from benchmarks.machine import machine
from benchmarks.stream_gaps import stream_gaps
from deploy.processes import Child, ProcessCluster, free_port

PLAIN = {"model": "fake", "prompt": "hello", "max_tokens": 2, "seed": 1}
STREAM_TOKENS = 256
_DURATION = {"us": 1e-3, "ms": 1.0, "s": 1e3}


def wrk(url: str, body: dict[str, Any], *, connections: int, seconds: int, scratch: Path) -> dict[str, float]:
    """Requests per second and latency percentiles (ms) of one `wrk` run. Raises RuntimeError when a request failed."""
    script = scratch / "post.lua"
    payload = json.dumps(body).replace("'", "")
    script.write_text(
        f"wrk.method='POST'\nwrk.headers['Content-Type']='application/json'\nwrk.body='{payload}'\n", encoding="utf-8"
    )
    command = [
        "wrk",
        "-t1",
        f"-c{connections}",
        f"-d{seconds}s",
        "--timeout",
        "30s",
        "--latency",
        "-s",
        str(script),
        url,
    ]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=seconds + 30).stdout
    if "Non-2xx" in text or "Socket errors" in text:
        raise RuntimeError(f"{url}: requests failed:\n{text}")
    rate = re.search(r"Requests/sec:\s+([\d.]+)", text)
    if rate is None:
        raise RuntimeError(f"wrk printed no rate:\n{text}")
    found = {f"p{q}": (value, unit) for q, value, unit in re.findall(r"(50|99)%\s+([\d.]+)(us|ms|s)\b", text)}
    latency = {f"{name}_ms": round(float(value) * _DURATION[unit], 3) for name, (value, unit) in found.items()}
    return {"requests_per_s": float(rate.group(1)), **latency}


STUBS = [["benchmarks.stub_worker"]]  # both workers in one process, at no cost


def paced_fakes(step_ms: float) -> list[list[str]]:
    """Modules and options of fake workers that decode one token a step, through the whole hand-off."""
    common = ["--model", "fake", "--prefill-ms", "0", "--step-ms", str(step_ms), "--max-num-seqs", "4096"]
    return [["benchmarks.fake_worker", "--role", role, *common] for role in ("prefill", "decode")]


@contextlib.contextmanager
def baton_router(scratch: Path, processes: int = 1, workers: Sequence[Sequence[str]] = STUBS) -> Iterator[str]:
    """Our router over workers of these modules and options; yields its base address."""
    from llm_engine.models.synthetic import make_checkpoint

    model = scratch / "nano"
    if not model.exists():
        make_checkpoint("nano", model)
    settings = {"model.path": str(model), "model.name": "fake", "router.processes": processes}
    cluster = ProcessCluster(scratch / "router", settings, prefill=0, decode=0)
    with contextlib.ExitStack() as stack:
        addresses: list[str] = []
        for index, command in enumerate(workers):
            child = Child("worker", [sys.executable, "-m", *command], scratch / f"worker-{index}.log", cluster.env)
            stack.callback(child.stop)
            info = child.wait_ready(20)
            addresses += info.get("addresses") or [info["request_addr"]]
        cluster.settings["router.workers"] = addresses
        stack.enter_context(cluster)
        _wait_status(f"{cluster.url}/ready", 20)
        yield cluster.url


@contextlib.contextmanager
def sglang_router(scratch: Path, python: Path) -> Iterator[str]:
    """sglang-router in PD mode over two HTTP fakes in one process, as the stubs are; yields its base address."""
    fakes = Child(
        "http-fakes", [sys.executable, "-m", "benchmarks.fake_http_worker", "--count", "2"], scratch / "http.log", {}
    )
    ports = fakes.wait_ready(20)["ports"]
    port, metrics_port = free_port(), free_port()
    command = [str(python), "-m", "sglang_router.launch_router", "--pd-disaggregation", "--policy", "round_robin"]
    command += ["--prefill", f"http://127.0.0.1:{ports[0]}", "9001", "--decode", f"http://127.0.0.1:{ports[1]}"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--log-level", "error"]
    command += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics_port)]
    with (scratch / "sglang.log").open("wb") as sink, subprocess.Popen(command, stdout=sink, stderr=sink) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_status(f"{url}/readiness", 60)
            yield url
        finally:
            process.terminate()
            fakes.stop()


def _wait_status(url: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    with httpx.Client(trust_env=False, timeout=2.0) as client:
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.HTTPError):
                if client.get(url).status_code == 200:
                    return
            time.sleep(0.1)
    raise RuntimeError(f"{url} did not answer 200 within {timeout_s} s")


def rates(url: str, seconds: int, scratch: Path) -> dict[str, Any]:
    """Plain requests at 1 and 32 connections."""
    target = f"{url}/v1/completions"
    return {f"connections_{n}": wrk(target, PLAIN, connections=n, seconds=seconds, scratch=scratch) for n in (1, 32)}


def relay(url: str, seconds: int, scratch: Path) -> dict[str, Any]:
    """Relayed tokens per second of long streams."""
    report: dict[str, Any] = {}
    for n in (64, 256):
        body = PLAIN | {"stream": True, "max_tokens": STREAM_TOKENS, "ignore_eos": True}
        run = wrk(f"{url}/v1/completions", body, connections=n, seconds=seconds, scratch=scratch)
        report[f"streams_{n}"] = {"tokens_per_s": round(run["requests_per_s"] * STREAM_TOKENS)}
    return report


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.router_rate", description=__doc__)
    parser.add_argument("--sglang-python", type=Path, help="interpreter of a venv with sglang-router")
    parser.add_argument("--seconds", type=int, default=5, help="length of each run")
    parser.add_argument("--rounds", type=int, default=3, help="how often the routers take turns")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="router processes to try")
    parser.add_argument("--rates-only", action="store_true", help="requests per second only")
    args = parser.parse_args(argv)
    if shutil.which("wrk") is None:
        print("wrk is not installed (Debian: apt-get install wrk)", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="baton-router-") as directory:
        report = measure(args, Path(directory))
    print(json.dumps(report, indent=2))
    return 0


def measure(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Everything."""
    report: dict[str, Any] = {"machine": machine(), "rounds": []}
    for _ in range(args.rounds):
        turn: dict[str, Any] = {}
        report["rounds"].append(turn)
        for processes in args.processes:
            with baton_router(scratch, processes) as url:
                turn[f"baton_{processes}"] = rates(url, args.seconds, scratch)
        if args.sglang_python:
            with sglang_router(scratch, args.sglang_python) as url:
                turn["sglang_router"] = rates(url, args.seconds, scratch)
    if args.rates_only:
        return report
    with baton_router(scratch) as url:
        report["added_ttft"] = {f"connections_{n}": added_ttft(url, "fake", connections=n) for n in (1, 8)}
    for processes in args.processes:
        with baton_router(scratch, processes, paced_fakes(0.0)) as url:
            report[f"relay_{processes}"] = relay(url, args.seconds, scratch)
    with baton_router(scratch, workers=paced_fakes(5.0)) as url:
        report["stream_at_5_ms"] = stream_gaps(url, "fake", tokens=100, repeats=3)
    return report


if __name__ == "__main__":
    raise SystemExit(main())
