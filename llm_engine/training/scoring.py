"""Exact match on held-out samples without generating: greedy text is right iff every token of it is the likeliest."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor

from llm_engine.training.feed import PAD_ID
from llm_engine.training.model import NanoModel
from llm_engine.training.render import Document, document
from llm_engine.training.samples import draw
from llm_engine.training.skills import EVALUATION


def held_out(tokenizer: Tokenizer, count: int, longest: int, seed: int = 0) -> dict[str, list[Document]]:
    """`count` documents of every skill, those longer than `longest` tokens left out."""
    found: dict[str, list[Document]] = {}
    for name, skill in EVALUATION.items():
        rng = random.Random(f"{seed}/{name}")
        documents = (document(draw(skill, rng, held_out=True), tokenizer) for _ in range(count))
        found[name] = [made for made in documents if len(made.ids) <= longest]
    return found


@torch.no_grad()
def exact_match(model: NanoModel, tests: Mapping[str, Sequence[Document]], *, sparse: bool) -> dict[str, float]:
    """Share of samples answered exactly, by skill; `drafts`: share of answer tokens that the MTP layer foresees."""
    model.eval()
    scores: dict[str, float] = {}
    foreseen: list[float] = []
    for name, documents in tests.items():
        if documents:
            right, drafted = _score(model, documents, sparse)
            scores[name] = round(right, 4)
            foreseen.append(drafted)
    model.train()
    return scores | {"drafts": round(sum(foreseen) / len(foreseen), 4)}


def _score(model: NanoModel, documents: Sequence[Document], sparse: bool) -> tuple[float, float]:
    device = model.cos.device
    longest = -(-max(len(made.ids) for made in documents) // 16) * 16
    ids = torch.full((len(documents), longest), PAD_ID, device=device)
    segments = torch.zeros_like(ids)
    answers = torch.zeros_like(ids, dtype=torch.bool)
    for row, made in enumerate(documents):
        ids[row, : len(made.ids)] = torch.tensor(made.ids, device=device)
        segments[row, : len(made.ids)] = 1
        answers[row, made.num_prompt : len(made.ids)] = True
    logits, drafts, _ = model(ids, segments, sparse=sparse)
    right = logits[:, :-1].argmax(-1) == ids[:, 1:]
    exact = (right | ~answers[:, 1:]).all(-1)
    drafted: Tensor = (drafts[:, :-2].argmax(-1) == ids[:, 2:])[answers[:, 1:-1] & answers[:, 2:]]
    return float(exact.float().mean()), float(drafted.float().mean())
