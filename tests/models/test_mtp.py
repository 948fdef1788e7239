"""The MTP layer against transformers' `MtpModel`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llm_engine.models.deepseek_v32 import build_model
from llm_engine.models.spec import ModelSpec
from llm_engine.ops import Ops
from llm_engine.runtime.weights import load_weights
from tests.models.harness import Harness, random_tokens
from tests.models.oracle import Oracle


@pytest.mark.parametrize("chunks", [[150], [100, 30, 1, 19]], ids=["one pass", "chunks"])
def test_states_equal_the_reference(oracle: Oracle, ops: Ops, chunks: list[int]) -> None:
    harness = Harness.load(oracle.path, ops)
    ids = random_tokens(harness.model.spec, sum(chunks) + 1)
    hidden = oracle.run(ids).hidden[:-1]
    states, start = [], 0
    for length in chunks:
        end = start + length
        states.append(harness.run_mtp([(0, start, ids[start + 1 : end + 1])], hidden[start:end]))
        start = end
    error = (torch.cat(states) - oracle.mtp(ids[1:], hidden)).abs().amax(1)
    assert (error > 1e-4).float().mean() <= 0.02, error


def test_drafts_use_the_final_norm_state_and_the_next_token(oracle: Oracle, exact: Ops) -> None:
    """From main pass to draft logits with our own states in between."""
    harness = Harness.load(oracle.path, exact)
    ids = random_tokens(harness.model.spec, 60)
    hidden = harness.run([(0, 0, ids)])
    drafts = harness.model.draft_logits(harness.run_mtp([(0, 0, ids[1:])], hidden[:-1]))
    reference = oracle.run(ids)
    with torch.no_grad():
        expected = oracle.model.lm_head(oracle.mtp(ids[1:], reference.hidden[:-1]))
    torch.testing.assert_close(drafts[:, :264], expected[:, :264], atol=1e-4, rtol=0)
    assert drafts[:, 264:].eq(-torch.inf).all()


def test_a_model_without_the_layer_says_so(nano_dir: Path, exact: Ops) -> None:
    spec = ModelSpec.from_dir(nano_dir)
    model = build_model(spec, load_weights(nano_dir, spec, torch.float32, with_mtp=False), exact, 64)
    harness = Harness.load(nano_dir, exact)
    assert not model.has_mtp
    batch = harness.batch([(0, 0, [5, 6])])
    with pytest.raises(ValueError, match=r"engine\.num_drafts=0"):
        model.mtp(batch, torch.zeros(len(batch.token_ids_R), spec.hidden_size), harness.store)
