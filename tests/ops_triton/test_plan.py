"""Plans of batches whose sequences have equally many rows, which one launch makes, against what is counted here."""

from __future__ import annotations

import pytest
import torch

from llm_engine.ops import ForwardBatch
from llm_engine.ops_triton.plan import GROUP_ROWS, plan


@pytest.mark.parametrize(("num_seqs", "count"), [(1, 1), (3, 1), (19, 1), (5, 4), (4, 9), (1, 37)])
def test_uniform_batches(num_seqs: int, count: int) -> None:
    torch.manual_seed(count)
    rows, padding, longest = num_seqs * count, 2, 90
    positions = torch.randint(longest, (rows + padding,))
    angles = torch.rand(longest, 5)
    batch = ForwardBatch(
        token_ids_R=positions,
        positions_R=positions,
        slots_N=torch.arange(rows),
        block_tables_SB=torch.zeros(num_seqs, 12, dtype=torch.int32),
        row_starts=tuple(range(0, rows + 1, count)),
        context_lens=(longest,) * num_seqs,
    )
    made = plan(batch, block_tokens=8, cos_TJ=angles.cos(), sin_TJ=angles.sin())
    assert made.visible_N.tolist() == (positions[:rows] + 1).tolist()
    assert made.seqs_N.tolist() == [row // count for row in range(rows)]
    assert made.lengths_S.tolist() == made.visible_N[count - 1 :: count].tolist()
    assert (made.starts_S.tolist(), made.num_keys) == ([seq * longest for seq in range(num_seqs)], num_seqs * longest)
    assert torch.equal(made.cos_RJ, angles.cos()[positions])
    assert torch.equal(made.sin_RJ, angles.sin()[positions])
    firsts = [seq * count + first for seq in range(num_seqs) for first in range(0, count, GROUP_ROWS)]
    assert made.group_starts_G.tolist() == firsts
    assert made.group_starts.tolist() == [*firsts, rows]
    assert made.group_sizes_G.tolist() == [min(GROUP_ROWS, count - first % count) for first in firsts]
