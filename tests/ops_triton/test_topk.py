from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from llm_engine.ops_triton import topk
from llm_engine.ops_triton.lang import Ptr, kernel
from llm_engine.ops_triton.orders import as_order
from llm_engine.ops_triton.topk import choose, choose_by_rows
from llm_engine.ops_triton.topk_chunks import choose_by_chunks, chunk_width

Way = Callable[[Tensor, Tensor, Tensor], None]
WAYS = [choose_by_rows, partial(choose_by_chunks, chunk=2048), partial(choose_by_chunks, chunk=8192)]


@pytest.fixture(params=WAYS, ids=["rows", "chunks-2048", "chunks-8192"])
def way(request: pytest.FixtureRequest) -> Iterator[Way]:
    """By one program a row or several; memory that nobody has written holds the largest numbers."""
    torch.use_deterministic_algorithms(True)
    yield request.param
    torch.use_deterministic_algorithms(False)


@kernel
def _orders(scores: Ptr, orders: Ptr, num_columns: int, TILE: tl.constexpr) -> None:
    at = tl.program_id(0) * num_columns + tl.arange(0, TILE)
    there = tl.arange(0, TILE) < num_columns
    order = as_order(tl.load(scores + at, mask=there, other=0.0))
    tl.store(orders + at, order.to(tl.int32, bitcast=True), mask=there)


def orders_of(scores: Tensor, visible: list[int]) -> Tensor:
    """Rows for `choose`. What nobody may look at is as large as can be."""
    orders = torch.empty(scores.shape, dtype=torch.int32)
    _orders[(len(scores),)](scores, orders, scores.shape[1], triton.next_power_of_2(scores.shape[1]))
    orders[torch.arange(scores.shape[1]) >= torch.tensor(visible)[:, None]] = -1
    return orders


def chosen(scores: Tensor, visible: list[int], k: int, way: Way = choose) -> list[list[int]]:
    """Selections, by row, without the -1 behind them."""
    sel = torch.full((len(visible), k), -7, dtype=torch.int32)
    way(orders_of(scores, visible), torch.tensor(visible, dtype=torch.int32), sel)
    rows = []
    for row, count in zip(sel.tolist(), visible, strict=True):
        kept = min(k, count)
        assert row[kept:] == [-1] * (k - kept)
        rows.append(row[:kept])
    return rows


def expected(scores: Tensor, count: int, k: int) -> list[int]:
    """By sorting; NaN comes last, both zeros are equal."""
    values = [float("-inf") if score != score else score + 0.0 for score in scores[:count].tolist()]
    isnan = scores[:count].isnan().tolist()
    return sorted(sorted(range(count), key=lambda t: (isnan[t], -values[t], t))[:k])


@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_equals_sorting(data: st.DataObject) -> None:
    width, k = data.draw(st.integers(1, 70)), data.draw(st.sampled_from([1, 3, 16, 40]))
    values = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-40, 3.5, float("inf"), float("-inf"), float("nan"), 2.0**-130])
    scores = torch.tensor([data.draw(st.lists(values | st.floats(width=32), min_size=width, max_size=width))] * 2)
    visible = [data.draw(st.integers(1, width)), width]
    assert chosen(scores, visible, k) == [expected(scores[i], visible[i], k) for i in (0, 1)]


@pytest.mark.parametrize("distinct", [2, 1000])
def test_rows_longer_than_a_tile(distinct: int, way: Way) -> None:
    """Counts and places carry over from tile to tile; with few distinct scores the last place is a tie across them."""
    torch.manual_seed(distinct)
    scores = torch.randint(0, distinct, (2, 9000)).float() - distinct / 2
    scores[:, 8500:] = torch.nan  # nobody may look beyond the end of a row
    visible = [8500, 4097]
    assert chosen(scores, visible, 2048, way) == [expected(scores[i], visible[i], 2048) for i in (0, 1)]


def test_zeros_of_both_signs_are_equal_and_nan_is_last(way: Way) -> None:
    scores = torch.tensor([[-0.0, 0.0, -1.0, 0.0, -0.0], [torch.nan, -torch.inf, 1.0, -torch.nan, -5.0]])
    assert chosen(scores, [5, 5], 2, way) == [[0, 1], [2, 4]]
    assert chosen(scores, [5, 5], 3, way) == [[0, 1, 3], [1, 2, 4]]


def test_short_rows_select_everything(way: Way) -> None:
    scores = torch.full((3, 20), torch.nan)
    assert chosen(scores, [1, 8, 7], 8, way) == [[0], list(range(8)), list(range(7))]


BY_ROWS = [(width, WAYS[0]) for width in (9000, 20000, 40000, 70000)]
BY_CHUNKS = [(9000, WAYS[1]), (40000, WAYS[1]), (20000, WAYS[2]), (70000, WAYS[2])]


@pytest.mark.parametrize(("width", "way"), BY_ROWS + BY_CHUNKS, indirect=["way"])
def test_rows_of_every_length(width: int, way: Way) -> None:
    """Distinct scores, scores that differ in their last bits only, and zeros; short rows under a long bound."""
    torch.manual_seed(width)
    scores = torch.stack([torch.randn(width), 1 + torch.randint(0, 9, (width,)) * 2.0**-22, torch.zeros(width)])
    scores = torch.cat([scores, scores[:1], scores[:1]])
    visible = [width, width - 3, width, 3000, 2000]
    assert chosen(scores, visible, 2048, way) == [expected(scores[i], visible[i], 2048) for i in range(5)]


def misleading(width: int) -> dict[str, Tensor]:
    """Scores of which a sample says little, or of which no bound lets through as many as can be gathered."""
    usual = torch.randn(width)
    return {
        "most of the best where none is sampled": torch.where(torch.arange(width) % 16 < 8, -1 - usual.abs(), usual),
        "all of the best where some are sampled": torch.where(torch.arange(width) % 64 < 8, usual.abs(), -1.0),
        "the best side by side": torch.where(torch.arange(width) >= width - 6000, usual + 9, usual),
        "rising": torch.arange(width).float(),
        "few that are numbers": torch.where(torch.arange(width) % 40 == 0, usual, torch.nan),
        "few distinct": (usual * 3).round(),
        "some infinite": torch.where(usual > 1.5, torch.inf, -torch.inf),
    }


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("width", [8256, 20000])
def test_what_a_sample_says_changes_nothing(width: int, many: bool, way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many rows one program takes several, one after the other, and fewer candidates."""
    if many:
        monkeypatch.setattr(topk, "_FEW", 0)
        monkeypatch.setattr(topk, "_MOST_WARPS", 16)
    torch.manual_seed(width)
    cases = misleading(width)
    scores = torch.stack(list(cases.values()))
    visible = [width - 700 * row for row in range(len(scores) - 2)] + [4097, 4096]
    got = chosen(scores, visible, 2048, way)
    for row, name in enumerate(cases):
        assert got[row] == expected(scores[row], visible[row], 2048), name


@pytest.mark.parametrize("chunk", [2048, 4096])
def test_chunks_share_ties_and_may_hold_nothing(chunk: int) -> None:
    """The last places go to ties that lie in several chunks, of which one has all that is above them, one nothing."""
    scores = torch.full((2, 12000), -1.0)
    scores[:, 4096:4200] = 2.0
    scores[0, 9000:12000:3] = 0.5
    scores[1, 1:12000:1000] = torch.nan
    got = chosen(scores, [12000, 12000], 2048, partial(choose_by_chunks, chunk=chunk))
    assert got == [expected(scores[i], 12000, 2048) for i in (0, 1)]


@pytest.mark.parametrize(
    ("rows", "width", "chunk"),
    [
        (1, 8192, None),  # in registers of one program
        (1, 16384, 2048),
        (1, 65536, 2048),
        (1, 131072, 4096),
        (1, 163840, 8192),
        (1, 1 << 20, 8192),
        (4, 65536, 2048),
        (16, 65536, 4096),
        (64, 65536, None),  # rows enough
        (4096, 65536, None),
        (0, 65536, 2048),
    ],
)
def test_few_long_rows_are_cut(rows: int, width: int, chunk: int | None) -> None:
    assert chunk_width(rows, width, 2048) == chunk
