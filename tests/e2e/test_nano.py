"""The model that ships with Baton, asked over HTTP: it knows what it was trained for, and needs every page for it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from benchmarks.accuracy import draft_counts, evaluate, problems, summarise
from deploy.commands import SHIPPED_MODEL
from deploy.processes import Child, ProcessCluster
from llm_engine.training.skills import EVALUATION

pytestmark = pytest.mark.timeout(300)

SEED = 5
SHORT = [skill for skill in EVALUATION if skill != "retrieval-32x"]
AGGREGATED = {"prefill": 0, "decode": 0, "aggregated": 1}


def settings(**extra: Any) -> dict[str, Any]:
    return {
        "model.path": str(SHIPPED_MODEL),
        "kv.memory_mb": 256,
        "scheduler.max_step_tokens": 512,
        **{key.replace("__", "."): value for key, value in extra.items()},
    }


class LossyCluster(ProcessCluster):
    """Prefill workers lose the indexer's pages on the way."""

    def _launch(self, name: str, command: list[str]) -> Child:
        return super()._launch(name, [word.replace("prefill_worker", "tests.e2e.zeroing_worker") for word in command])


def score(cluster: ProcessCluster, skills: list[str], samples: int, seed: int = SEED) -> dict[str, Any]:
    asked = problems(skills, samples, seed)
    verdicts = asyncio.run(evaluate(cluster.url, asked, concurrency=4, timeout_s=100.0, on_done=lambda: None))
    report = summarise(verdicts)
    assert report["errors"] == 0, report["first_error"]
    return report


def share(report: dict[str, Any]) -> float:
    """Right answers over all skills."""
    skills = report["skills"].values()
    return float(sum(s["right"] for s in skills) / sum(s["samples"] for s in skills))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report of one prefill and one decode worker, with the drafts that the decode worker verified."""
    with ProcessCluster(tmp_path_factory.mktemp("whole"), settings()) as cluster:
        report = score(cluster, SHORT, samples=3)
        decode = [cluster.infos["decode-0"]["metrics_addr"]]
        report["verified"], report["accepted"] = asyncio.run(draft_counts(decode))
    return report


def test_it_answers_and_drafts_well(whole: dict[str, Any]) -> None:
    assert share(whole) >= 0.9, whole
    assert whole["accepted"] / whole["verified"] >= 0.7


@pytest.mark.slow
def test_without_index_pages_it_finds_nothing_far_away(whole: dict[str, Any], tmp_path: Path) -> None:
    config = settings(transfer__checksum="count")  # checksums would notice
    with LossyCluster(tmp_path, config) as lossy:
        report = score(lossy, ["retrieval-8x"], samples=3)
    assert whole["skills"]["retrieval-8x"]["right"] == 3, whole
    assert report["skills"]["retrieval-8x"]["right"] == 0, report


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("config", "roles"),
    [
        (settings(), {}),
        (settings(), AGGREGATED),
        (settings(engine__dtype="bf16", engine__numerics="fast"), {}),
        (settings(engine__dtype="bf16", engine__numerics="fast"), AGGREGATED),
    ],
    ids=["fp32-pd", "fp32-aggregated", "bf16-pd", "bf16-aggregated"],
)
def test_targets(config: dict[str, Any], roles: dict[str, int], tmp_path: Path) -> None:
    """The lower end of each interval would ask for more samples than this; the score itself has to reach the target."""
    with ProcessCluster(tmp_path, config, **roles) as cluster:
        skills = score(cluster, SHORT, samples=100)["skills"]
    for skill, target in {"retrieval-2x": 0.95, "retrieval-8x": 0.95, "arithmetic": 0.9, "tool-call": 0.9}.items():
        assert skills[skill]["score"] >= target, skills[skill]
