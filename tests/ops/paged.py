"""A paged cache with sequences in it, and batches over them. Everything that nobody wrote is NaN."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_engine.ops import AttentionPlan, ForwardBatch, Ops

PAIRS = 8
MAX_POSITIONS = 2048


@dataclass
class Paged:
    """`rows[s]`: what sequence s has in the cache, [length, width]. Blocks are scattered over the plane."""

    plane: Tensor
    rows: list[Tensor]
    tables: Tensor
    block_tokens: int

    @classmethod
    def random(
        cls, lengths: Sequence[int], width: int, dtype: torch.dtype, *, block_tokens: int = 8, seed: int = 0
    ) -> Paged:
        generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
        needed = [-(-length // block_tokens) for length in lengths]
        ids = random.Random(seed).sample(range(sum(needed) + 3), sum(needed))
        plane = torch.full((sum(needed) + 3, block_tokens, width), torch.nan, dtype=dtype)
        tables = torch.full((len(lengths), max(needed)), -1, dtype=torch.int32)
        rows = []
        for seq, length in enumerate(lengths):
            tables[seq, : needed[seq]] = torch.tensor([ids.pop() for _ in range(needed[seq])], dtype=torch.int32)
            rows.append(torch.randn(length, width, generator=generator).to(dtype))
            slots = cls._slots(tables[seq], range(length), block_tokens)
            plane.view(-1, width)[slots] = rows[seq]
        return cls(plane, rows, tables, block_tokens)

    @staticmethod
    def _slots(table: Tensor, positions: Sequence[int], block_tokens: int) -> Tensor:
        at = torch.tensor(list(positions))
        return table.long()[at // block_tokens] * block_tokens + at % block_tokens

    def batch(self, spans: Sequence[tuple[int, int, int]], row_tile: int) -> ForwardBatch:
        """Rows `first` .. `end - 1` of some sequences, given as (sequence, first, end)."""
        positions = [p for _, first, end in spans for p in range(first, end)]
        padded = positions + [positions[-1]] * (-len(positions) % row_tile)
        starts = [0]
        for _, first, end in spans:
            starts.append(starts[-1] + end - first)
        batch = ForwardBatch(
            token_ids_R=torch.zeros(len(padded), dtype=torch.int64),
            positions_R=torch.tensor(padded),
            slots_N=torch.cat([self._slots(self.tables[s], range(a, b), self.block_tokens) for s, a, b in spans]),
            block_tables_SB=self.tables[torch.tensor([s for s, _, _ in spans])],
            row_starts=tuple(starts),
            context_lens=tuple(end for _, _, end in spans),
        )
        batch.check(self.block_tokens)
        return batch

    def plan(self, ops: Ops, spans: Sequence[tuple[int, int, int]]) -> AttentionPlan:
        batch = self.batch(spans, ops.row_tile)
        angles = all_angles()
        return ops.plan(batch, block_tokens=self.block_tokens, cos_TJ=angles.cos(), sin_TJ=angles.sin())


def all_angles() -> Tensor:
    """Rotation [position, pair]."""
    frequencies = 0.7 ** torch.arange(PAIRS, dtype=torch.float32)
    return torch.outer(torch.arange(MAX_POSITIONS, dtype=torch.float32), frequencies)


def padded_rows(x: Tensor, row_tile: int) -> Tensor:
    """Rows up to a multiple of the tile; what is added is NaN, which must stay where it is."""
    missing = -len(x) % row_tile
    return torch.cat([x, x.new_full((missing, *x.shape[1:]), torch.nan)])
