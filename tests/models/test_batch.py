"""`build_batch` against the batch's own check and a builder that goes token by token."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_engine.runtime.batch import SequenceRows, build_batch


@st.composite
def sequences(draw: st.DrawFn, block_tokens: int) -> list[SequenceRows]:
    free = iter(draw(st.permutations(range(64))))
    result = []
    for _ in range(draw(st.integers(0, 5))):
        start, count = draw(st.integers(0, 40)), draw(st.integers(1, 20))
        spare = draw(st.integers(0, 2))
        blocks = [next(free) for _ in range(-(-(start + count) // block_tokens) + spare)]
        result.append(SequenceRows(draw(st.lists(st.integers(0, 999), min_size=count, max_size=count)), start, blocks))
    return result


@given(data=st.data(), block_tokens=st.sampled_from([8, 16]), row_tile=st.sampled_from([1, 4, 16]))
def test_every_row_is_where_it_belongs(data: st.DataObject, block_tokens: int, row_tile: int) -> None:
    parts = data.draw(sequences(block_tokens))
    batch = build_batch(parts, block_tokens=block_tokens, row_tile=row_tile)
    batch.check(block_tokens)
    rows = [(t, p.start + i, p.blocks) for p in parts for i, t in enumerate(p.token_ids)]
    count = len(rows)
    assert batch.num_rows == count
    assert len(batch.token_ids_R) % row_tile == 0
    assert len(batch.token_ids_R) - count < row_tile
    assert batch.token_ids_R[:count].tolist() == [token for token, _, _ in rows]
    assert batch.positions_R[:count].tolist() == [position for _, position, _ in rows]
    assert batch.slots_N.tolist() == [
        blocks[position // block_tokens] * block_tokens + position % block_tokens for _, position, blocks in rows
    ]
    assert batch.context_lens == tuple(p.start + len(p.token_ids) for p in parts)
    for values in (batch.token_ids_R, batch.positions_R):
        assert set(values[count:].tolist()) <= set(values[count - 1 : count].tolist()), "padding repeats the last row"


def test_a_short_block_table_is_refused() -> None:
    with pytest.raises(ValueError, match="the block table is too short"):
        build_batch([SequenceRows([1, 2], 15, [3])], block_tokens=16, row_tile=1)
