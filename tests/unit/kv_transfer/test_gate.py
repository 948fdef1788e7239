import threading
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_transfer import gate as gate_module
from kv_transfer.gate import Doors, WriteGate
from kv_transfer.layout import CellMap, merge_runs
from kv_transfer.link import Landed, LeaseKey
from llm_engine.api.errors import ProtocolError
from tests.unit.kv_transfer.rig import make_layout


def test_no_write_starts_after_the_stop() -> None:
    gate = WriteGate()
    stopped: list[str] = []
    assert gate.enter()
    gate.leave()
    gate.stop(lambda: stopped.append("at once"))
    assert stopped == ["at once"]
    assert gate.stopped()
    assert not gate.enter()
    gate.stop(lambda: stopped.append("again"))
    assert stopped == ["at once", "again"]


def test_the_stop_is_reported_when_the_running_write_has_ended() -> None:
    gate = WriteGate()
    stopped: list[str] = []
    inside, go_on = threading.Event(), threading.Event()

    def write() -> None:
        assert gate.enter()
        inside.set()
        go_on.wait(5)
        gate.leave()

    writer = threading.Thread(target=write)
    writer.start()
    assert inside.wait(5)
    gate.stop(lambda: stopped.append("first"))
    gate.stop(lambda: stopped.append("second"))
    assert stopped == []
    go_on.set()
    writer.join()
    assert stopped == ["first", "second"]


@settings(deadline=None)
@given(
    lease=st.lists(st.integers(0, 15), min_size=1, max_size=12, unique=True),
    row=st.sampled_from([0, 2, 3, 7]),
    cached=st.integers(1, 500),
    data=st.data(),
)
def test_ranges_become_stretches_of_the_lease(lease: list[int], row: int, cached: int, data: st.DataObject) -> None:
    """Whatever is written of it, in runs or block by block, in whatever order: those blocks, in pieces that fit the
    cache."""
    layout = make_layout(16)
    plane, layer = [(plane, layer) for plane in layout.planes for layer in range(plane.num_layers)][row]
    memory = memoryview(bytes(index * 37 % 251 for index in range(layout.arena_bytes)))
    doors, key = Doors(CellMap(layout)), LeaseKey(1, 1)
    doors.open(key, 7, lease)
    assert doors.find(key, 8) is None
    door = doors.find(key, 7)
    assert door is not None
    first = data.draw(st.integers(0, len(lease) - 1))
    written = lease[first : data.draw(st.integers(first + 1, len(lease)))]
    runs = [(run.source, run.num_blocks) for run in merge_runs(written, written)]
    if data.draw(st.booleans()):
        runs = [(block, 1) for block in written]
    runs = data.draw(st.just(runs) | st.permutations(runs) | st.lists(st.sampled_from(runs), min_size=1, max_size=20))
    ranges = [(plane.address(layer, block, 16), count * plane.block_bytes) for block, count in runs]
    with mock.patch.object(gate_module, "CACHED_BYTES", cached):
        stretches = doors.check(door, ranges, memory)
    positions = [position for each in stretches for position in range(each.first, each.last)]
    assert positions == [lease.index(block) + n for block, count in runs for n in range(count)]
    for each in stretches:
        starts = [plane.address(layer, block, 16) for block in lease[each.first : each.last]]
        assert b"".join(each.parts) == b"".join(memory[start : start + plane.block_bytes] for start in starts)
        assert each.num_bytes == len(starts) * plane.block_bytes <= max(cached, plane.block_bytes)
        assert each.row == row
        door.record(each)
        door.record(each)
    assert door.landed() == Landed(len(set(positions)), len(set(positions)) * plane.block_bytes)


@pytest.mark.parametrize(("block", "count"), [(3, 2), (4, 2), (5, 2), (2, 1), (6, 1), (3, 3)])
def test_only_blocks_that_follow_each_other_in_the_lease_are_admitted(block: int, count: int) -> None:
    layout = make_layout(16)
    doors, key = Doors(CellMap(layout)), LeaseKey(1, 1)
    doors.open(key, 7, [4, 3, 5])
    door = doors.find(key, 7)
    assert door is not None
    plane = layout.planes[0]
    with pytest.raises(ProtocolError, match="do not follow each other"):
        doors.check(door, [(plane.address(1, block, 16), count * plane.block_bytes)], memoryview(bytes(1 << 16)))
