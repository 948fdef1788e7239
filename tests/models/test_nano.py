"""The shipped checkpoint: complete, small, and computed by the engine as by transformers."""

from __future__ import annotations

import random

import pytest
from transformers import AutoTokenizer

from deploy.commands import SHIPPED_MODEL
from llm_engine.models.checkpoint import inspect_checkpoint
from llm_engine.models.spec import ModelSpec
from llm_engine.ops import Ops
from llm_engine.training.render import answer_text, prompt_text
from llm_engine.training.samples import draw
from llm_engine.training.skills import EVALUATION
from llm_engine.training.skills_retrieval import far
from router.tokenizer import Tokenizer
from tests.models.harness import Harness
from tests.models.oracle import TOLERANCE, Oracle

MAX_BYTES = 16_000_000


def test_it_is_small_and_has_every_mechanism() -> None:
    facts = inspect_checkpoint(SHIPPED_MODEL)
    assert facts["missing"] == []
    assert facts["files"] == ["model.safetensors"]
    assert facts["bytes"] <= MAX_BYTES
    spec = ModelSpec.from_dir(SHIPPED_MODEL)
    assert spec.indexer is not None
    assert spec.max_position >= 32 * spec.indexer.topk
    assert spec.num_mtp_layers == 1
    assert spec.rope.yarn is not None
    assert (spec.moe.num_groups, spec.moe.top_groups, spec.moe.num_shared) == (4, 2, 1)


def test_the_tokenizer_files_serve_everyone() -> None:
    theirs, ours = AutoTokenizer.from_pretrained(SHIPPED_MODEL), Tokenizer.from_dir(SHIPPED_MODEL)
    for name, skill in EVALUATION.items():
        sample = draw(skill, random.Random(name))
        text = prompt_text(sample) + answer_text(sample)
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False) == text
    assert [len(theirs.encode(digit, add_special_tokens=False)) for digit in ("7", "42", "365")] == [1, 2, 3]


def test_logits_and_answer_equal_the_reference(exact: Ops) -> None:
    """Beyond `index_topk`, with trained weights. Near ties of a choice move single rows by little."""
    sample = draw(far(128), random.Random(4), held_out=True)
    ours = Tokenizer.from_dir(SHIPPED_MODEL)
    theirs = AutoTokenizer.from_pretrained(SHIPPED_MODEL)
    ids = theirs.encode(prompt_text(sample) + answer_text(sample), add_special_tokens=False)
    num_prompt = len(theirs.encode(prompt_text(sample), add_special_tokens=False))
    harness = Harness.load(SHIPPED_MODEL, exact)
    logits = harness.logits(harness.in_chunks(ids, [150, len(ids) - 150]))
    reference = Oracle(SHIPPED_MODEL).run(ids)
    error = (logits - reference.logits[:, : logits.shape[1]]).abs().amax(1)
    assert error.median() < TOLERANCE
    assert error.quantile(0.95) < 100 * TOLERANCE
    answer = logits[num_prompt - 1 : -1].argmax(-1).tolist()
    assert answer == reference.logits[num_prompt - 1 : -1].argmax(-1).tolist()
    assert ours.decode(answer) == answer_text(sample)


@pytest.mark.parametrize("skill", ["turns", "tool-call", "json"])
def test_drafts_foresee_the_answer(skill: str, exact: Ops) -> None:
    sample = draw(EVALUATION[skill], random.Random(1), held_out=True)
    theirs = AutoTokenizer.from_pretrained(SHIPPED_MODEL)
    ids = theirs.encode(prompt_text(sample) + answer_text(sample), add_special_tokens=False)
    num_prompt = len(theirs.encode(prompt_text(sample), add_special_tokens=False))
    harness = Harness.load(SHIPPED_MODEL, exact)
    hidden = harness.run([(0, 0, ids)])
    drafted = harness.model.draft_logits(harness.run_mtp([(0, 0, ids[1:])], hidden[:-1])).argmax(-1).tolist()
    pairs = list(zip(drafted[num_prompt - 1 : -1], ids[num_prompt + 1 :], strict=True))
    assert sum(draft == token for draft, token in pairs) >= 0.7 * len(pairs)
