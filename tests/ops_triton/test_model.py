"""A whole model through the Triton table, against the CPU's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llm_engine.ops import Ops, load_ops
from llm_engine.ops_triton.lang import INTERPRETED
from tests.models.harness import Harness, random_tokens

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="the harness keeps its tensors on the CPU")


@pytest.fixture(scope="module")
def cpu() -> Ops:
    return load_ops("cpu", "exact", "fp32")


@pytest.mark.parametrize("size", ["nano", pytest.param("nano-v3", marks=pytest.mark.slow)])
def test_logits_and_drafts_equal_the_cpu_table(size: str, request: pytest.FixtureRequest, exact: Ops, cpu: Ops) -> None:
    """Two sequences, in passes that mix chunks and single rows; beyond `index_topk` positions in the first."""
    path: Path = request.getfixturevalue(size.replace("-", "_") + "_dir")
    logits, drafts = [], []
    for ops in (cpu, exact):
        harness = Harness.load(path, ops, num_seqs=2, max_len=64)
        long, short = random_tokens(harness.model.spec, 20), random_tokens(harness.model.spec, 3, seed=2)
        passes = [
            [(0, 0, long[:17])],
            [(0, 17, long[17:19]), (1, 0, short[:2])],
            [(1, 2, short[2:]), (0, 19, long[19:])],
        ]
        states = [harness.run(rows) for rows in passes]
        logits.append(harness.logits(torch.cat(states)))
        drafts.append(harness.model.draft_logits(harness.run_mtp([(0, 0, long[1:4])], states[0][:3])))
    torch.testing.assert_close(logits[1], logits[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(drafts[1], drafts[0], atol=1e-4, rtol=1e-4)
