"""A model with its store, driven by plain lists of tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llm_engine.api.config import KvConfig
from llm_engine.models.deepseek_v32 import CausalLM, build_model
from llm_engine.models.spec import ModelSpec
from llm_engine.ops import ForwardBatch, Ops
from llm_engine.runtime.batch import SequenceRows, build_batch
from llm_engine.runtime.kv_store import KvStore, plan_layout
from llm_engine.runtime.weights import load_weights


@dataclass
class Harness:
    """`rows` of a pass: (sequence, first position, tokens). Every sequence owns a fixed, scattered block table."""

    model: CausalLM
    store: KvStore
    ops: Ops
    tables: list[list[int]]

    @classmethod
    def load(cls, path: Path, ops: Ops, *, num_seqs: int = 1, max_len: int = 512, block_tokens: int = 16) -> Harness:
        spec = ModelSpec.from_dir(path)
        weights = load_weights(path, spec, ops.dtype, fp8_block=ops.fp8_block, progress=False)
        blocks_per_seq = -(-max_len // block_tokens)
        kv = KvConfig(block_tokens=block_tokens, num_blocks=max(8, blocks_per_seq * num_seqs))
        store = KvStore.allocate(plan_layout(spec, kv, ops.dtype, with_mtp=True), ops.dtype)
        store.arena.view(ops.dtype).fill_(torch.nan)  # whoever reads a row that was never written will show it
        harness = cls(build_model(spec, weights, ops, max_len), store, ops, [])
        harness.scatter(num_seqs, blocks_per_seq, seed=0)
        return harness

    def scatter(self, num_seqs: int, blocks_per_seq: int, seed: int) -> None:
        """Deal the blocks to `num_seqs` sequences in random order."""
        ids = random.Random(seed).sample(range(self.store.num_blocks), num_seqs * blocks_per_seq)
        self.tables = [ids[i::num_seqs] for i in range(num_seqs)]

    def batch(self, rows: Sequence[tuple[int, int, Sequence[int]]]) -> ForwardBatch:
        batch = build_batch(
            [SequenceRows(tokens, start, self.tables[seq]) for seq, start, tokens in rows],
            block_tokens=self.store.block_tokens,
            row_tile=self.ops.row_tile,
        )
        batch.check(self.store.block_tokens)
        return batch

    def run(self, rows: Sequence[tuple[int, int, Sequence[int]]]) -> Tensor:
        """Hidden states of the real rows of one pass."""
        batch = self.batch(rows)
        return self.model.forward(batch, self.store)[: batch.num_rows]

    def run_mtp(self, rows: Sequence[tuple[int, int, Sequence[int]]], hidden: Tensor) -> Tensor:
        """MTP states of the real rows; `hidden` has one row a token."""
        batch = self.batch(rows)
        padded = torch.zeros(len(batch.token_ids_R), hidden.shape[1], dtype=hidden.dtype)
        padded[: batch.num_rows] = hidden
        return self.model.mtp(batch, padded, self.store)[: batch.num_rows]

    def in_chunks(self, tokens: Sequence[int], chunks: Sequence[int], seq: int = 0) -> Tensor:
        """Hidden states of all positions, computed in passes of the given lengths."""
        assert sum(chunks) == len(tokens)
        states, start = [], 0
        for length in chunks:
            states.append(self.run([(seq, start, tokens[start : start + length])]))
            start += length
        return torch.cat(states)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits over the ids the tokenizer knows."""
        return self.model.logits(hidden)[:, : self.model.spec.num_tokens]


def random_tokens(spec_or_size: ModelSpec | int, count: int, seed: int = 1) -> list[int]:
    """Any ids of the vocabulary, padding ids included: the model computes them like others."""
    size = spec_or_size if isinstance(spec_or_size, int) else spec_or_size.vocab_size
    rng = random.Random(seed)
    return [rng.randrange(size) for _ in range(count)]
