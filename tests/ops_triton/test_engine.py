"""Whole engines over the Triton table: recorded decode passes, drafts, hand-offs between two stores.

The same suite at real sizes, on a card, is `tests/gpu`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_engine.ops_triton.lang import INTERPRETED
from tests.gpu.lab import Lab, StagedPair, requests

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
    driver, _ = lab.driver(num_drafts=num_drafts, graphs=True, chunk=16, max_num_seqs=2)
    for submit in requests(lab.spec, [19, 3], 3):
        driver.add(submit)
    driver.run()
    assert driver.outputs == outputs


def test_sequences_handed_over_through_host_memory_give_the_same_tokens(
    lab: Lab, outputs: dict[str, list[int]]
) -> None:
    pair = StagedPair(lab, num_drafts=1, graphs=True)
    assert pair.run(requests(lab.spec, [19, 3], 3)) == outputs
