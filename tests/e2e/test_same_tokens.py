"""Promise 1: the same tokens and logits, whatever serves them. Real processes, random weights, no outlier budget."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from deploy.processes import ProcessCluster
from tests.e2e.client import Ask, complete_all, essence, random_asks

NUM_PROMPTS = 204
ASKS = random_asks(NUM_PROMPTS, seed=7, longest=90, max_tokens=12)


def settings(model: Path, **extra: Any) -> dict[str, Any]:
    return {
        "model.path": str(model),
        "model.name": "baton",
        "engine.num_drafts": 0,
        "kv.memory_mb": 32,
        "scheduler.max_step_tokens": 256,
        **{key.replace("__", "."): value for key, value in extra.items()},
    }


def serve(run_dir: Path, config: dict[str, Any], *passes: tuple[list[Ask], int, bool], **roles: int) -> list[Any]:
    """Start a cluster and run each pass (asks, requests at once, streaming); one list of results per pass."""
    with ProcessCluster(run_dir, config, **roles) as cluster:
        return [
            [essence(c) for c in asyncio.run(complete_all(cluster.url, asks, at_once=n, streaming=streaming))]
            for asks, n, streaming in passes
        ]


@pytest.fixture(scope="module")
def reference(nano_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Aggregated, no speculation, no prefix cache, one request at a time."""
    config = settings(nano_dir, kv__prefix_cache=False)
    run_dir = tmp_path_factory.mktemp("reference")
    return serve(run_dir, config, (ASKS, 1, False), prefill=0, decode=0, aggregated=1)[0]


def test_reference_is_sensitive(reference: list[Any]) -> None:
    """The comparison is worth something only if different requests give different answers."""
    assert len(set(reference)) > NUM_PROMPTS * 0.9


@pytest.mark.parametrize(
    ("transport", "drafts", "chunk"),
    [("shm", 1, 48), ("tcp", 3, 256), ("tcp", 0, 16)],
    ids=["shm-K1-chunk48", "tcp-K3-chunk256", "tcp-K0-chunk16"],
)
def test_disaggregated_equals_aggregated(
    transport: str, drafts: int, chunk: int, nano_dir: Path, tmp_path: Path, reference: list[Any]
) -> None:
    config = settings(
        nano_dir, transfer__transport=transport, engine__num_drafts=drafts, scheduler__max_step_tokens=chunk
    )
    cold, warm = serve(tmp_path, config, (ASKS, 16, False), (ASKS, 16, True))
    assert cold == reference
    assert warm == reference


def test_aggregated_with_speculation_in_mixed_batches(nano_dir: Path, tmp_path: Path, reference: list[Any]) -> None:
    config = settings(nano_dir, engine__num_drafts=2, scheduler__max_step_tokens=48)
    cold, warm = serve(tmp_path, config, (ASKS, 16, True), (ASKS, 5, False), prefill=0, decode=0, aggregated=1)
    assert cold == reference
    assert warm == reference
