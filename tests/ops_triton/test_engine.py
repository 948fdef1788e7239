"""Whole engines over the Triton table: recorded decode passes, drafts, hand-offs between two stores.

The same suite at real sizes, on a card, is `tests/gpu`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from decode_worker.aggregated import AggregatedWorker
from llm_engine.api.config import SECRET_ENV, build
from llm_engine.ops_triton.lang import INTERPRETED
from tests.gpu.lab import Lab, StagedPair, requests
from tests.unit.worker.in_process import SECRET, serving

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="tests/gpu does this natively")


@pytest.fixture(scope="module")
def lab(nano_dir: Path) -> Lab:
    return Lab.load(nano_dir, max_len=64)


@pytest.fixture(scope="module")
def outputs(lab: Lab) -> dict[str, list[int]]:
    return lab.alone(requests(lab.spec, [19, 3], 3))


@pytest.mark.slow
@pytest.mark.parametrize("num_drafts", [0, 2])
def test_recorded_passes_in_a_batch_give_the_same_tokens(
    lab: Lab, outputs: dict[str, list[int]], num_drafts: int
) -> None:
    """Launched ahead, as on a card."""
    driver, _ = lab.driver(num_drafts=num_drafts, graphs=True, chunk=16, max_num_seqs=2, ahead=True)
    for submit in requests(lab.spec, [19, 3], 3):
        driver.add(submit)
    driver.run()
    assert driver.outputs == outputs


@pytest.mark.slow
def test_sequences_handed_over_through_host_memory_give_the_same_tokens(
    lab: Lab, outputs: dict[str, list[int]]
) -> None:
    pair = StagedPair(lab, num_drafts=1, graphs=True)
    assert pair.run(requests(lab.spec, [19, 3], 3)) == outputs


@pytest.mark.slow
async def test_a_worker_is_configured_to_serve_with_it(nano_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens as from the CPU's kernels, and caches that are never exchanged with them."""
    monkeypatch.setenv(SECRET_ENV, SECRET)
    tokens, formats = [], []
    for backend in ("cpu", "triton"):
        config = build(
            {
                "model": {"path": str(nano_dir), "max_len": 64},
                "engine": {"backend": backend, "dtype": "fp32"},
                "kv": {"memory_mb": 4},
                "scheduler": {"max_num_seqs": 2},
                "worker": {"heartbeat_s": 0.1},
            }
        )
        async with serving(AggregatedWorker.build(config, "a")) as router:
            stream = router.stream(list(range(40, 58)), max_tokens=3, seed=1)
            await router.submit(stream, "a")
            await router.finished(stream, timeout_s=60.0)
            tokens.append(stream.tokens)
            formats.append(router.infos["a"].format_id)
    assert tokens[0] == tokens[1]
    assert formats[0] != formats[1]
