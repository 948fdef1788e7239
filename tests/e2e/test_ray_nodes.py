"""Pools scale apart on a Ray cluster whose own autoscaler brings and removes the nodes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.e2e import netns

REASON = netns.missing()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(REASON), reason=REASON),
    pytest.mark.timeout(600),
]


def test_nodes_follow_the_pools_and_no_stream_breaks(nano_planted_dir: Path, tmp_path: Path) -> None:
    with netns.Host() as host:
        command = [sys.executable, "-m", "tests.e2e.fake_nodes", str(nano_planted_dir), str(tmp_path)]
        done = host.run(*command, timeout_s=500.0)
    logs = "\n".join(path.read_text(errors="replace")[-2000:] for path in tmp_path.glob("run/logs/*.log"))
    assert done.returncode == 0, done.stderr[-4000:] + logs
    seen = json.loads((tmp_path / "seen.json").read_text(encoding="utf-8"))
    print(json.dumps({key: value for key, value in seen.items() if key != "texts"}))
    assert seen["first_nodes"] == {"prefill": 1, "decode": 1}
    assert seen["nodes_after_decode"] == {"prefill": 1, "decode": 3}
    assert seen["nodes_after_prefill"] == {"prefill": 2, "decode": 3}
    assert seen["wrong"] == []
    assert seen["streams"] > 3
    assert len(seen["texts"]) == 1
    for worker in ("prefill-0", "decode-0", "decode-1", "decode-2"):
        log = (tmp_path / "run" / "logs" / f"{worker}.log").read_text(encoding="utf-8")
        assert "ASCEND_RT_VISIBLE_DEVICES=0" in log, worker
