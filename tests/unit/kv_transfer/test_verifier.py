"""What the checksums notice, whether blocks are hashed at the end or as they land."""

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_transfer import verifier as verifier_module
from kv_transfer.layout import PlaneLayer
from kv_transfer.link import LeaseKey, Stretch
from kv_transfer.manifest import ManifestBuilder, Policy, RowDigest
from kv_transfer.verifier import Landing, Verifier
from llm_engine.api.handoff import Manifest
from tests.unit.kv_transfer.rig import cells, make_layout

LAYOUT = make_layout(12)
ROWS = [PlaneLayer(index, layer) for index, plane in enumerate(LAYOUT.planes) for layer in range(plane.num_layers)]
BLOCKS = [7, 2, 3, 11]
LEASE = LeaseKey(9, 2)


def stored(memory: bytearray, row: int, first: int, last: int) -> Stretch:
    """Blocks [first, last) of the lease have landed."""
    plane = LAYOUT.planes[ROWS[row].plane]
    starts = [plane.address(ROWS[row].layer, block, 12) for block in BLOCKS[first:last]]
    parts = [memoryview(memory)[start : start + plane.block_bytes] for start in starts]
    return Stretch(row, first, last, sum(map(len, parts)), parts)


class Bench:
    """Memory, and the manifest of what it holds at first."""

    def __init__(self, policy: Policy = "full") -> None:
        self.memory = bytearray(np.random.default_rng(0).integers(0, 256, LAYOUT.arena_bytes, np.uint8).tobytes())
        builder = ManifestBuilder(LAYOUT, policy, LEASE)
        for row in ROWS:
            plane = LAYOUT.planes[row.plane]
            for block in BLOCKS:
                start = plane.address(row.layer, block, 12)
                builder.add(row, memoryview(self.memory)[start : start + plane.block_bytes])
        self.manifest: Manifest = builder.build(14, 4)
        self.verifier = Verifier(LAYOUT, memoryview(self.memory))

    def landing(self, blocks: list[int] = BLOCKS) -> Landing:
        return self.verifier.land(LEASE, blocks, "full")

    def check(self, landing: Landing | None = None) -> str | None:
        return asyncio.run(self.verifier.check(self.manifest, landing or self.landing(), 14))


@pytest.fixture(params=["inline", "threads"])
def bench(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    limit = 1 << 20 if request.param == "inline" else 0
    monkeypatch.setattr(verifier_module, "_INLINE_BYTES", {"full": limit, "sampled": limit})
    bench = Bench()
    yield bench
    bench.verifier.close()


def test_every_changed_byte_of_every_row_is_found(bench: Bench) -> None:
    assert bench.check() is None
    for block in BLOCKS:
        for row, cell in zip(ROWS, cells(LAYOUT, block), strict=True):
            bench.memory[cell.stop - 1] ^= 1
            verdict = bench.check()
            assert verdict is not None
            assert verdict.startswith(f"plane {LAYOUT.planes[row.plane].name}, layer {row.layer}: ")
            bench.memory[cell.stop - 1] ^= 1
    assert bench.check() is None


def test_other_blocks_do_not_matter_but_their_order_does(bench: Bench) -> None:
    for cell in cells(LAYOUT, 5):
        bench.memory[cell] = bytes(cell.stop - cell.start)
    assert bench.check() is None
    assert bench.check(bench.landing(BLOCKS[::-1])) is not None


def by_hand(bench: Bench) -> tuple[Landing, list[Callable[[], None]]]:
    """A landing whose background work waits for the test to run it."""
    jobs: list[Callable[[], None]] = []
    return Landing(LAYOUT, memoryview(bench.memory), "full", LEASE, tuple(BLOCKS), jobs.append), jobs


@settings(max_examples=60, deadline=None)
@given(claims=st.lists(st.tuples(st.integers(-1, 6), st.integers(0, 9)), max_size=30), order=st.randoms())
def test_hashing_early_in_any_order_gives_the_same_verdict(claims: list[tuple[int, int]], order: Any) -> None:
    bench = Bench()
    landing, jobs = by_hand(bench)
    for claim in claims:
        landing.advance([claim])
    assert len(jobs) <= 4 * len(BLOCKS)  # however often something is claimed
    order.shuffle(jobs)
    for job in jobs[: len(jobs) // 2]:
        job()
    assert landing.finish(bench.manifest, range(4)) is None
    for job in jobs:
        job()
    assert landing.left_bytes() == 0
    bench.verifier.close()


def test_what_has_been_hashed_early_is_not_hashed_again(bench: Bench) -> None:
    landing, jobs = by_hand(bench)
    before = landing.left_bytes()
    landing.advance([(0, 4), (1, 2)])
    for job in jobs:
        job()
    assert landing.left_bytes() == before - (4 + 2) * (96 + 40)


def test_a_block_claimed_before_it_landed_is_rejected(bench: Bench) -> None:
    landing, jobs = by_hand(bench)
    cell = next(cells(LAYOUT, BLOCKS[1]))
    late, bench.memory[cell] = bench.memory[cell], bytes(cell.stop - cell.start)
    landing.advance([(0, 2)])
    jobs[0]()
    bench.memory[cell] = late
    assert landing.finish(bench.manifest, range(4)) is not None


def test_nothing_is_hashed_for_a_lease_that_is_over(bench: Bench) -> None:
    landing, jobs = by_hand(bench)
    before = landing.left_bytes()
    landing.advance([(0, 4)])
    landing.end()
    jobs[0]()
    assert landing.left_bytes() == before


SIZE = 3 * 4096 + 500  # not whole pages


@pytest.mark.parametrize("phase", range(0, 4096, 640))
def test_samples_notice_every_page_and_the_end_of_every_block(phase: int) -> None:
    data = np.random.default_rng(1).integers(0, 256, 5 * SIZE, np.uint8)

    def digest(data: np.ndarray, cuts: list[int]) -> int:  # type: ignore[type-arg]
        row = RowDigest(SIZE, phase)
        for first, last in zip([0, *cuts], [*cuts, 5], strict=True):
            row.update(memoryview(data)[first * SIZE : last * SIZE])
        return row.value()

    whole = digest(data, [])
    assert digest(data, [1, 2, 3, 4]) == digest(data, [3]) == whole
    for block in range(5):
        for start in (0, 4096, 8192, SIZE - 64):
            other = data.copy()
            other[block * SIZE + start : block * SIZE + start + 4096] ^= 255
            assert digest(other, [2]) != whole


def test_samples_of_small_blocks_are_all_of_them() -> None:
    data = bytes(range(96))
    assert len({_small(data[:i] + b"\xff" + data[i + 1 :]) for i in range(96)}) == 96


def _small(data: bytes) -> int:
    row = RowDigest(96, 64)
    row.update(memoryview(data))
    return row.value()


@settings(max_examples=40, deadline=None)
@given(order=st.permutations([(row, position) for row in range(len(ROWS)) for position in range(len(BLOCKS))]))
def test_cells_that_land_in_any_order_give_the_same_verdict(order: list[tuple[int, int]]) -> None:
    bench = Bench()
    landing, _ = by_hand(bench)
    for row, position in order:
        landing.on_landed(stored(bench.memory, row, position, position + 1))
    assert landing.finish(bench.manifest, range(4)) is None
    bench.verifier.close()


def test_runs_of_blocks_are_hashed_as_they_land() -> None:
    bench = Bench()
    landing, _ = by_hand(bench)
    before = landing.left_bytes()
    landing.on_landed(stored(bench.memory, 0, 0, 1))
    landing.on_landed(stored(bench.memory, 0, 1, 3))
    assert landing.left_bytes() == before - 3 * 96
    landing.on_landed(stored(bench.memory, 1, 0, 1))
    landing.on_landed(stored(bench.memory, 1, 2, 3))  # one is missing in between
    assert landing.left_bytes() == before - 4 * 96
    bench.verifier.close()


@pytest.mark.parametrize("right_last", [True, False])
def test_a_block_that_is_stored_twice_counts_as_it_is_at_the_end(right_last: bool) -> None:
    bench = Bench()
    landing, _ = by_hand(bench)
    cell = next(cells(LAYOUT, BLOCKS[0]))
    right, wrong = bench.memory[cell], bytes(cell.stop - cell.start)
    for value in (wrong, right) if right_last else (right, wrong):
        bench.memory[cell] = value
        landing.on_landed(stored(bench.memory, 0, 0, 1))
    assert (landing.finish(bench.manifest, range(4)) is None) == right_last
    bench.verifier.close()
