"""Logits of the card against those of the CPU in fp32, by dtype of weights and pages.

Rounding may move a row to another expert or another selection, whose logits then differ by much: rows are compared one
by one, and the typical row and the choice of the next token count.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from deploy.commands import SHIPPED_MODEL
from llm_engine.models.spec import ModelSpec
from llm_engine.ops import load_ops
from llm_engine.runtime.batch import SequenceRows, build_batch
from llm_engine.training.render import answer_text, prompt_text
from llm_engine.training.samples import draw
from llm_engine.training.skills_retrieval import far
from tests.gpu.conftest import Note
from tests.gpu.lab import BLOCK, Lab
from tests.models.harness import Harness

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(100)]

_CHUNK = 512


@dataclass(frozen=True)
class Case:
    numerics: str
    dtype: str
    pages: str
    median: float  # of the rows' largest errors, relative to the spread of their logits

    def __str__(self) -> str:
        return f"{self.numerics}-{self.dtype}-{self.pages}-pages"


CASES = [
    Case("exact", "fp32", "auto", 1e-3),
    Case("exact", "bf16", "auto", 0.15),
    Case("fast", "bf16", "auto", 0.15),
    Case("exact", "bf16", "fp8", 0.4),
    Case("fast", "fp8", "fp8", 1.0),
]


def tokens_of(size: str, path: Path) -> tuple[list[int], int]:
    """More than `index_topk` ids, and how many of them are the prompt: of a trained answer, or of nothing."""
    spec = ModelSpec.from_dir(path)
    assert spec.indexer is not None
    if size == "tiny-gpu":
        rng = random.Random(size)
        ids = [rng.randrange(spec.num_tokens) for _ in range(spec.indexer.topk + 250)]
        return ids, len(ids)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    sample = draw(far(128), random.Random(4), held_out=True)
    texts = (prompt_text(sample), answer_text(sample))
    prompt, answer = (tokenizer.encode(text, add_special_tokens=False).ids for text in texts)
    assert len(prompt) > 4 * spec.indexer.topk
    return [*prompt, *answer], len(prompt)


def on_cpu(path: Path, tokens: list[int]) -> Tensor:
    threads = torch.get_num_threads()
    torch.set_num_threads(8)
    try:
        harness = Harness.load(path, load_ops("cpu", "exact", "fp32"), max_len=len(tokens))
        starts = range(0, len(tokens), _CHUNK)
        states = [harness.run([(0, start, tokens[start : start + _CHUNK])]) for start in starts]
        return harness.logits(torch.cat(states))
    finally:
        torch.set_num_threads(threads)


def on_card(lab: Lab, tokens: list[int]) -> Tensor:
    store = lab.store(-(-len(tokens) // BLOCK) + 8, with_mtp=False)
    table = random.Random(1).sample(range(store.num_blocks), store.num_blocks)
    states = []
    for start in range(0, len(tokens), _CHUNK):
        rows = SequenceRows(tokens[start : start + _CHUNK], start, table)
        batch = build_batch([rows], block_tokens=BLOCK, row_tile=lab.ops.row_tile)
        states.append(lab.model.forward(batch.to(lab.ops.device), store))
    return lab.model.logits(torch.cat(states))[:, : lab.spec.num_tokens].cpu()


@pytest.fixture(scope="module")
def reference(tiny_gpu_dir: Path) -> dict[str, tuple[Path, list[int], int, Tensor]]:
    found = {}
    for size, path in (("tiny-gpu", tiny_gpu_dir), ("baton-nano", SHIPPED_MODEL)):
        tokens, num_prompt = tokens_of(size, path)
        with torch.inference_mode():
            found[size] = (path, tokens, num_prompt, on_cpu(path, tokens))
    return found


@pytest.mark.parametrize(
    ("size", "case"),
    [
        *(("baton-nano", case) for case in CASES),
        *(("tiny-gpu", case) for case in CASES if case.dtype != "fp32"),  # compiling its fp32 takes minutes
    ],
    ids=str,
)
def test_logits_are_those_of_the_cpu(size: str, case: Case, reference: Any, note: Note) -> None:
    path, tokens, num_prompt, expected = reference[size]
    lab = Lab.load(path, numerics=case.numerics, dtype=case.dtype, pages=case.pages, max_len=len(tokens) + 8)
    got = on_card(lab, tokens)
    error = (got - expected).abs().amax(1) / expected.std(1)
    same = (got.argmax(1) == expected.argmax(1)).float().mean().item()
    median, p90 = error.quantile(0.5).item(), error.quantile(0.9).item()
    note(size=size, case=str(case), median=round(median, 5), p90=round(p90, 5), same_choice=round(same, 4))
    assert torch.isfinite(got).all()
    assert median < case.median
    if size == "baton-nano":  # what it was trained for is far from any tie
        answer = slice(num_prompt - 1, len(tokens) - 1)
        assert got[answer].argmax(1).tolist() == expected[answer].argmax(1).tolist() == tokens[num_prompt:]
