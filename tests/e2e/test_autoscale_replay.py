"""The autoscaler under a replayed trace, on a live cluster whose workers take time instead of computing."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e import netns
from tests.e2e.paced import ROW_S, STEP_S
from tests.e2e.paced_cluster import CALM_S, MAX, MIXES, OUTPUT, PLACES, PROMPT, RATE, SETTINGS, STEP

REASON = netns.missing()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(REASON), reason=REASON),
    pytest.mark.timeout(400),
]
POOLS = ("prefill", "decode")


def run(scenario: str, model: Path, directory: Path) -> dict[str, Any]:
    with netns.Host() as host:
        command = [sys.executable, "-m", "tests.e2e.paced_cluster", scenario, str(model), str(directory)]
        done = host.run(*command, timeout_s=300.0)
    logs = "\n".join(path.read_text(errors="replace")[-2000:] for path in directory.glob("run/logs/*.log"))
    assert done.returncode == 0, done.stderr[-4000:] + logs
    seen: dict[str, Any] = json.loads((directory / "seen.json").read_text(encoding="utf-8"))
    return seen


def workers_of_load(rate: float, prompt: float, output: float) -> dict[str, float]:
    """How many workers of each pool such a load keeps busy, by arithmetic."""
    token_s = STEP_S + PLACES * ROW_S
    return {"prefill": rate * (STEP_S + prompt * ROW_S), "decode": rate * output * token_s / PLACES}


def reached(seen: dict[str, Any], pool: str, which: int, size: int) -> float:
    """When a pool had that size first. `which` 0: wanted, 1: ready."""
    return next(float(at) for at, pools in seen["pools"] if pools[pool][which] >= size)


def test_a_tenfold_step_is_followed_within_the_stated_time(nano_planted_dir: Path, tmp_path: Path) -> None:
    seen = run("step", nano_planted_dir, tmp_path)
    print(json.dumps({key: value for key, value in seen.items() if key != "ttft_s"}))
    assert seen["errors"] == []
    before, after = (workers_of_load(RATE * factor, PROMPT, OUTPUT) for factor in (1.0, STEP))
    assert max(before.values()) < 0.5, "one worker of each pool is plenty before the step"
    assert seen["pools"][0][1] == {pool: [1, 1] for pool in POOLS}
    assert {change[3] for change in seen["changes"]} == {"autoscaler"}
    start_s, rounds, ready_at = 0.0, 0, 0.0
    for pool in POOLS:
        needed = math.ceil(after[pool])
        assert 1 < needed < MAX
        wanted = [reached(seen, pool, 0, size) for size in range(2, needed + 1)]
        ready = [reached(seen, pool, 1, size) for size in range(2, needed + 1)]
        assert wanted[0] > CALM_S
        start_s = max(start_s, *(there - asked for asked, there in zip(wanted, ready, strict=True)))
        rounds += math.ceil(math.log2(needed))
        ready_at = max(ready_at, ready[-1])
        print(f"{pool}: {needed} workers {ready[-1] - CALM_S:.1f} s after the step")
    stated = SETTINGS["window_s"] + rounds * (SETTINGS["up_after_s"] + 3 * SETTINGS["period_s"] + start_s)
    print(f"both {ready_at - CALM_S:.1f} s after the step, stated {stated:.1f} s with starts of {start_s:.1f} s")
    assert ready_at - CALM_S <= stated
    last = max(at for at, _ in seen["ttft_s"])
    late = sorted(ttft for at, ttft in seen["ttft_s"] if at > (ready_at + last) / 2)
    assert len(late) > 30
    assert late[int(0.9 * len(late))] <= SETTINGS["ttft_slo_s"], "what had piled up is worked off"


def test_each_mix_gets_its_split_of_a_full_budget_recommended(nano_planted_dir: Path, tmp_path: Path) -> None:
    seen = run("mixes", nano_planted_dir, tmp_path)
    print(json.dumps({key: value for key, value in seen.items() if key not in MIXES}))
    assert seen["errors"] == []
    for mix, load in MIXES.items():
        work = workers_of_load(*load)
        best = min(range(1, 4), key=lambda p: max(work["prefill"] / p, work["decode"] / (4 - p)))
        right = {"prefill": best, "decode": 4 - best}
        assert right[mix] == 3, "the test's own arithmetic"
        said = seen[mix]
        assert sum(one == right for one in said) > 0.8 * len(said), said
        assert seen[f"{mix}_sizes"] == {"prefill": 2, "decode": 2}, "a dry run changes nothing"
        other = POOLS[1 - POOLS.index(mix)]
        assert seen[f"{mix}_reasons"][other].startswith(f"gives 1 to {mix}")
