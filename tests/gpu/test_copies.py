"""Scattered blocks by tensor copies: the same bytes as by loads and stores, and no others."""

from __future__ import annotations

import random

import pytest
import torch

from benchmarks.handoff_rig import make_layout
from kv_transfer.device import DeviceRegion
from kv_transfer.device_copies import CellCopies, make_copies
from kv_transfer.layout import CopyPlan
from llm_engine.api.handoff import KvLayout
from tests.unit.kv_transfer.rig import make_layout as make_odd_layout

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(100)]

HERE, THERE, SENT = 37, 53, 29  # blocks


@pytest.fixture(params=[0, 1])
def far(request: pytest.FixtureRequest) -> torch.device:
    """The receiver's card."""
    if request.param >= torch.cuda.device_count():
        pytest.skip(f"needs {request.param + 1} cards")
    return torch.device("cuda", request.param)


def filled(layout: KvLayout, device: torch.device) -> torch.Tensor:
    memory = torch.randint(-(2**62), 2**62, (layout.arena_bytes // 8,), device="cuda:0")
    return memory.to(device, copy=True)


@pytest.mark.parametrize("kv_format", ["bf16", "fp8"])
@pytest.mark.parametrize("layers", [range(6), range(2, 4), range(4, 6), range(5, 6)])
@pytest.mark.parametrize("sent", [SENT, 1])
def test_tensor_copies_equal_stores(kv_format: str, layers: range, sent: int, far: torch.device) -> None:
    if torch.cuda.get_device_capability(0) != (9, 0):
        pytest.skip("needs a Hopper")
    from kv_transfer.device_hopper import TileCopies

    here, there = make_layout(5, HERE, kv_format), make_layout(5, THERE, kv_format)
    region, plan = DeviceRegion(filled(here, torch.device("cuda:0")).view(torch.uint8)), CopyPlan(here, there)
    tables = [region.table(random.Random(seed).sample(range(count), sent)) for seed, count in ((1, HERE), (2, THERE))]
    expected = filled(there, far)
    found = expected.clone()
    by_tiles = make_copies(region, found, plan)
    assert isinstance(by_tiles, TileCopies)
    torch.cuda.synchronize(far)
    with region.copying():
        CellCopies(region, expected, plan)(layers, *tables)
        by_tiles(layers, *tables)
    region.synchronize()
    assert torch.equal(found, expected)


def test_cells_of_odd_sizes_are_stored() -> None:
    here = make_odd_layout(12)
    region = DeviceRegion(torch.zeros(here.arena_bytes, dtype=torch.uint8, device="cuda:0"))
    assert isinstance(make_copies(region, region.words, CopyPlan(here, here)), CellCopies)
