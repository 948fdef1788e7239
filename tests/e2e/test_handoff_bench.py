"""`baton bench handoff`: real processes, every mode, numbers that fit together."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.handoff_trace import LANES


def bench(*words: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "deploy.cli", "bench", "handoff", "--json", "--layers", "2", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_every_mode_reports_what_it_moved_and_what_the_link_could_do(transport: str) -> None:
    words = ["--transport", transport, "--tokens", "2048", "--mode", "all", "--repeat", "1"]
    report = bench(*words, "--compute-ms-per-layer", "2", "--kv-format", "fp8")
    assert report["transport"] == transport
    modes = {mode["mode"]: mode for mode in report["modes"]}
    block = (656 + 132) * 64 * 3  # two main layers and the MTP layer
    blocks = {"bulk": 32, "scatter": 32, "delta": 16, "small": 8, "concurrent-8": 4, "concurrent-32": 1}
    assert {name: mode["bytes"] for name, mode in modes.items()} == {name: n * block for name, n in blocks.items()}
    limit = {"shm": "memcpy", "tcp": "socket"}[transport]
    for mode in modes.values():
        assert 0 < mode["exposed_ms_p50"] <= mode["exposed_ms_p99"]
        assert mode[f"{limit}_gb_per_s_best"] > 0
        assert 0 <= mode["stage_ms_p50"]["drain"] <= mode["exposed_ms_p99"]
    assert modes["bulk"]["total_ms_p50"] > 6, "compute of three layers is part of the whole"
    assert 1 / 32 <= modes["concurrent-32"]["fairness"] <= 1


def test_the_timeline_shows_layers_pushed_while_others_are_computed(tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    bench(
        "--tokens", "1024", "--repeat", "1", "--compute-ms-per-layer", "60", "--ready-at", "0.2", "--trace", str(file)
    )
    events = [event for event in json.loads(file.read_text())["traceEvents"] if event["ph"] == "X"]
    lanes = {lane: [event for event in events if event["tid"] == number] for number, lane in enumerate(LANES)}
    assert [event["name"] for event in lanes["compute"]] == ["layer 0", "layer 1", "layer 2"]
    pushed = {event["name"]: event for event in lanes["push"]}
    first, computed = pushed["layer 0"], lanes["compute"][0]
    assert computed["ts"] < first["ts"], "not before its rows are stored"
    assert first["ts"] + first["dur"] < lanes["compute"][-1]["ts"] + lanes["compute"][-1]["dur"]
    assert all(commit["ts"] >= lanes["compute"][-1]["ts"] for commit in lanes["hand-off"])
    assert file.with_suffix(".svg").read_text().count("<title>") == len(events)


def test_pools_that_do_not_fit_are_refused_in_one_line() -> None:
    command = [sys.executable, "-m", "deploy.cli", "bench", "handoff", "--tokens", "10000000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 2
    assert "lower --tokens or --layers" in done.stderr
    assert len(done.stderr.splitlines()) == 1
