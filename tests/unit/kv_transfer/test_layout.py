import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_transfer import layout as layout_module
from kv_transfer.layout import CellMap, CopyPlan, PlaneLayer, check_layout, layer_planes, merge_runs, mismatch
from llm_engine.api.errors import LayoutMismatch, ProtocolError
from llm_engine.api.handoff import KvLayout, Plane
from tests.unit.kv_transfer.rig import make_layout

blocks = st.lists(st.integers(0, 19), unique=True, max_size=20)


@settings(deadline=None)
@given(blocks, st.randoms(use_true_random=False))
def test_runs_pair_every_block_once_in_order(sources: list[int], rng: object) -> None:
    targets = list(range(20))
    rng.shuffle(targets)  # type: ignore[attr-defined]
    targets = sorted(targets[: len(sources)]) if len(sources) % 2 else targets[: len(sources)]
    runs = merge_runs(sources, targets)
    pairs = [(r.source + i, r.target + i) for r in runs for i in range(r.num_blocks)]
    assert pairs == list(zip(sources, targets, strict=True))
    for left, right in itertools.pairwise(runs):  # nothing mergeable is left
        assert (left.source + left.num_blocks, left.target + left.num_blocks) != (right.source, right.target)


@settings(deadline=None)
@given(st.data())
def test_copies_move_exactly_the_blocks(data: st.DataObject) -> None:
    source, target = make_layout(20), make_layout(31)
    from_ = data.draw(blocks)
    to = data.draw(st.permutations(range(31)))[: len(from_)]
    plan = CopyPlan(source, target)
    expected, got = {}, {}
    for row in (PlaneLayer(p, layer) for p, plane in enumerate(source.planes) for layer in range(plane.num_layers)):
        ours, theirs = source.planes[row.plane], target.planes[row.plane]
        for a, b in zip(from_, to, strict=True):
            at, there = ours.address(row.layer, a, 20), theirs.address(row.layer, b, 31)
            expected.update({there + i: at + i for i in range(ours.block_bytes)})
        for copy in plan.copies(row, merge_runs(from_, to)):
            got.update({copy.target + i: copy.source + i for i in range(copy.num_bytes)})
    assert got == expected


def test_pieces_are_bounded_and_whole_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout_module, "PIECE_BYTES", 250)
    layout = make_layout(20)
    sizes = [
        copy.num_bytes for copy in CopyPlan(layout, layout).copies(PlaneLayer(0, 1), merge_runs(range(7), range(7)))
    ]
    assert sizes == [192, 192, 192, 96]


def test_layers_count_main_planes_first_and_mtp_after() -> None:
    assert layer_planes(make_layout(4)) == (
        (PlaneLayer(0, 0), PlaneLayer(1, 0)),
        (PlaneLayer(0, 1), PlaneLayer(1, 1)),
        (PlaneLayer(0, 2), PlaneLayer(1, 2)),
        (PlaneLayer(2, 0), PlaneLayer(3, 0)),
    )


@settings(deadline=None)
@given(st.integers(-200, 9000), st.integers(-50, 900))
def test_locate_knows_exactly_the_whole_cells(offset: int, num_bytes: int) -> None:
    layout = make_layout(16)
    legal = {
        (plane.address(layer, block, 16), count * plane.block_bytes): (row, block, count)
        for row, (plane, layer) in enumerate((p, n) for p in layout.planes for n in range(p.num_layers))
        for block in range(16)
        for count in range(1, 17 - block)
    }
    cell_map = CellMap(layout)
    if (offset, num_bytes) in legal:
        assert tuple(cell_map.locate(offset, num_bytes)) == legal[offset, num_bytes]
    else:
        with pytest.raises(ProtocolError):
            cell_map.locate(offset, num_bytes)
    for (start, length), cells in list(legal.items())[:: max(1, num_bytes % 97 + 1)]:
        assert tuple(cell_map.locate(start, length)) == cells


def test_bad_layouts_are_refused() -> None:
    good = make_layout(8)
    check_layout(good, good.arena_bytes)
    overlapping = KvLayout(
        block_tokens=4,
        num_blocks=8,
        planes=(
            Plane(name="a", num_layers=1, block_bytes=10, offset=0),
            Plane(name="b", num_layers=1, block_bytes=1, offset=79),
        ),
    )
    negative = KvLayout(block_tokens=4, num_blocks=8, planes=(Plane(name="a", num_layers=1, block_bytes=8, offset=-8),))
    empty = KvLayout(block_tokens=4, num_blocks=8, planes=())
    for bad, size in ((good, good.arena_bytes - 1), (overlapping, 1000), (negative, 1000), (empty, 1000)):
        with pytest.raises(LayoutMismatch):
            check_layout(bad, size)


def test_mismatch_names_both_sides() -> None:
    small, large = make_layout(8), make_layout(9, scale=2)
    assert mismatch(("p0", "f", small), ("d0", "f", make_layout(80))) is None
    assert "p0 has cache format f, d0 has g" in str(mismatch(("p0", "f", small), ("d0", "g", small)))
    text = str(mismatch(("p0", "f", small), ("d0", "f", large)))
    assert "p0 has blocks of 4 tokens, latent[3 layers × 96 B]" in text
    assert "d0 has blocks of 4 tokens, latent[3 layers × 192 B]" in text


def test_a_range_never_crosses_into_the_next_layer_or_plane() -> None:
    layout = make_layout(16)
    cell_map = CellMap(layout)
    for plane in layout.planes:
        for layer in range(plane.num_layers):
            for block in range(16):
                for count in range(17 - block, 20):
                    with pytest.raises(ProtocolError):
                        cell_map.locate(plane.address(layer, block, 16), count * plane.block_bytes)
