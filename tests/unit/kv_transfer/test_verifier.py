import asyncio
from collections.abc import Iterator

import numpy as np
import pytest

from kv_transfer import verifier as verifier_module
from kv_transfer.manifest import ManifestBuilder, rows_of
from kv_transfer.verifier import Verifier
from llm_engine.api.handoff import Manifest
from tests.unit.kv_transfer.rig import cells, make_layout

LAYOUT = make_layout(12)
BLOCKS = [7, 2, 3, 11]


@pytest.fixture(params=["inline", "threads"])
def bench(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Verifier, bytearray, Manifest]]:
    monkeypatch.setattr(verifier_module, "_INLINE_BYTES", 1 << 20 if request.param == "inline" else 0)
    memory = bytearray(np.random.default_rng(0).integers(0, 256, LAYOUT.arena_bytes, np.uint8).tobytes())
    builder = ManifestBuilder(LAYOUT, "full")
    for row in rows_of(LAYOUT):
        plane = LAYOUT.planes[row.plane]
        for block in BLOCKS:
            start = plane.address(row.layer, block, 12)
            builder.add(row, memoryview(memory)[start : start + plane.block_bytes])
    verifier = Verifier(LAYOUT, memoryview(memory), "full")
    yield verifier, memory, builder.build(14, 4)
    verifier.close()


def test_every_changed_byte_of_every_row_is_found(bench: tuple[Verifier, bytearray, Manifest]) -> None:
    verifier, memory, manifest = bench

    async def check() -> str | None:
        return await verifier.check(manifest, BLOCKS, 14)

    assert asyncio.run(check()) is None
    rows = rows_of(LAYOUT)
    for block in BLOCKS:
        for row, cell in zip(rows, cells(LAYOUT, block), strict=True):
            memory[cell.stop - 1] ^= 1
            verdict = asyncio.run(check())
            assert verdict is not None
            assert verdict.startswith(f"plane {LAYOUT.planes[row.plane].name}, layer {row.layer}: ")
            memory[cell.stop - 1] ^= 1
    assert asyncio.run(check()) is None


def test_other_blocks_do_not_matter_but_their_order_does(bench: tuple[Verifier, bytearray, Manifest]) -> None:
    verifier, memory, manifest = bench
    for cell in cells(LAYOUT, 5):
        memory[cell] = bytes(cell.stop - cell.start)
    assert asyncio.run(verifier.check(manifest, BLOCKS, 14)) is None
    assert asyncio.run(verifier.check(manifest, BLOCKS[::-1], 14)) is not None
