"""What attention needs to know of a batch, once for all layers.

Shapes: R rows, N real rows, S sequences, B blocks of the longest table, J rope pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from torch import Tensor

from llm_engine.ops import ForwardBatch
from llm_engine.ops_cpu.jit import Floats, Ints, Longs


@dataclass(frozen=True, slots=True)
class CpuPlan:
    """Rows, the cache rows they may see, and their rotations."""

    num_rows: int
    slots_N: Longs  # where each real row is written
    seqs_N: Longs  # sequence of each real row
    visible_N: Longs  # positions it sees: 0 .. visible - 1
    max_visible: int
    row_starts: tuple[int, ...]  # rows of sequence s: row_starts[s] .. row_starts[s + 1] - 1
    tables_SB: Ints
    block_tokens: int
    cos_RJ: Floats
    sin_RJ: Floats


def plan(batch: ForwardBatch, *, block_tokens: int, cos_TJ: Tensor, sin_TJ: Tensor) -> CpuPlan:
    """See `llm_engine.ops.spec.Plan`."""
    rows = batch.num_rows
    counts = [end - first for first, end in pairwise(batch.row_starts)]
    positions = batch.positions_R
    return CpuPlan(
        num_rows=rows,
        slots_N=batch.slots_N.numpy(),
        seqs_N=np.repeat(np.arange(batch.num_seqs), counts),
        visible_N=positions[:rows].numpy() + 1,
        row_starts=batch.row_starts,
        max_visible=max(batch.context_lens, default=0),
        tables_SB=batch.block_tables_SB.contiguous().numpy(),
        block_tokens=block_tokens,
        cos_RJ=cos_TJ.index_select(0, positions).numpy(),
        sin_RJ=sin_TJ.index_select(0, positions).numpy(),
    )
