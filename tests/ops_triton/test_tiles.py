from __future__ import annotations

import pytest

from llm_engine.ops_triton.mla import _EXACT_SPLIT, _splits
from llm_engine.ops_triton.tiles import cut_product, expert_tiles

ROWS = (1, 2, 16, 17, 64, 65, 300, 8192)
WEIGHTS = [(7168, 2240), (1536, 24576), (16384, 7168), (7168, 256), (512, 128), (64, 192)]  # depth, columns


@pytest.mark.parametrize(("depth", "columns"), WEIGHTS)
def test_exact_sums_do_not_follow_the_rows(depth: int, columns: int) -> None:
    cuts = [cut_product("exact", rows, depth, columns) for rows in ROWS]
    assert len({(cut.tile, cut.splits) for cut in cuts}) == 1
    assert not cuts[-1].parallel, "partial sums of many rows would fill the memory"
    assert len({expert_tiles("exact", rows / 32, 256, depth, columns) for rows in ROWS}) == 1
    assert {_splits(rows, 128, 512, keys, "exact")[0] for rows in ROWS for keys in (10, 2048, 10**5)} == {_EXACT_SPLIT}


@pytest.mark.parametrize(("depth", "columns"), WEIGHTS)
def test_few_rows_still_occupy_the_card(depth: int, columns: int) -> None:
    for numerics in ("exact", "fast"):
        cut = cut_product(numerics, 1, depth, columns)  # type: ignore[arg-type]
        programs = -(-columns // cut.tile.columns) * cut.splits
        assert programs >= min(64, depth // 1024 * -(-columns // 128)), f"{numerics}: {programs} programs"


def test_partial_sums_of_attention_stay_within_a_bound() -> None:
    for rows in ROWS:
        for keys in (2048, 10**5):
            for numerics in ("exact", "fast"):
                _, count, portion = _splits(rows, 128, 512, keys, numerics)  # type: ignore[arg-type]
                assert count == 1 or portion * count * 128 * 512 * 4 <= 600 << 20
