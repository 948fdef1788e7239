from __future__ import annotations

import pytest
import torch

from llm_engine.ops_triton.deal import deal


@pytest.mark.parametrize("with_shared", [False, True])
@pytest.mark.parametrize(("rows", "experts", "tile_rows"), [
    (1, 7, 16), (9, 40, 16), (16, 4, 16), (28, 300, 64), (17, 4, 16), (30, 4, 16), (700, 5, 64), (4200, 3, 64),
])  # fmt: skip
def test_every_choice_has_a_slot_of_its_expert(rows: int, experts: int, tile_rows: int, with_shared: bool) -> None:
    """700 rows are more choices than one scan takes, 4200 more than one long scan does."""
    torch.manual_seed(rows)
    named = experts - with_shared
    ids = torch.rand(rows, named).argsort(-1)[:, :2]
    dealt = deal(ids, experts, tile_rows, with_shared=with_shared)
    slots, rows_of = dealt.slot_of_choice_RK.tolist(), dealt.row_of_slot.tolist()
    expert_of = dealt.expert_of_tile_T.tolist()
    placed = [(slot, row, rank) for row, ranks in enumerate(slots) for rank, slot in enumerate(ranks)]
    assert len({slot for slot, _, _ in placed}) == len(placed)
    for slot, row, rank in placed:
        assert rows_of[slot] == row
        assert expert_of[slot // tile_rows] == (int(ids[row, rank]) if rank < 2 else experts - 1)
    used = [tile for tile, expert in enumerate(expert_of) if expert >= 0]
    assert used == list(range(len(used)))
    assert [expert_of[tile] for tile in used] == sorted(expert_of[tile] for tile in used)
    taken = {slot for slot, _, _ in placed}
    idle = [slot for tile in used for slot in range(tile * tile_rows, (tile + 1) * tile_rows) if slot not in taken]
    assert {rows_of[slot] for slot in idle} <= {-1}
    order = [(expert_of[slot // tile_rows], row) for slot, row, _ in sorted(placed)]
    assert order == sorted(order), "the rows of an expert stand in the order of the batch"
