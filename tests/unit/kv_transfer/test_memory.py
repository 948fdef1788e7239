import gc
import mmap
import os

import numpy as np
import pytest

from kv_transfer.memory import Arena
from llm_engine.api.errors import ConfigError, TransferError
from tests.unit.kv_transfer.rig import arena_mappings


@pytest.mark.parametrize("shared", [False, True])
def test_an_arena_is_zeroed_writable_and_gone_after_close(shared: bool) -> None:
    before, mapped = set(os.listdir("/proc/self/fd")), len(arena_mappings())
    with Arena.create(1 << 20, shared=shared) as arena:
        view = np.frombuffer(arena.buffer, dtype=np.uint8)
        assert len(view) == 1 << 20
        assert not view.any()
        view[7] = 9
        assert arena.buffer[7] == 9
        assert arena.shared is shared
        del view
    gc.collect()
    assert set(os.listdir("/proc/self/fd")) == before
    assert len(arena_mappings()) == mapped
    with pytest.raises(TransferError, match="closed"):
        _ = arena.buffer


def test_views_outlive_a_closed_arena() -> None:
    arena = Arena.create(1 << 16, shared=True)
    view = np.frombuffer(arena.buffer, dtype=np.uint8)
    arena.close()
    view[:] = 3  # no crash: the mapping lives as long as the view


def test_a_holder_of_the_descriptor_can_not_shrink_it() -> None:
    with Arena.create(1 << 16, shared=True) as arena:
        for size in (0, 1 << 20):
            with pytest.raises(PermissionError):
                os.ftruncate(arena.fileno(), size)
        other = mmap.mmap(arena.fileno(), 1 << 16)
        other[5] = 77
        assert arena.buffer[5] == 77
        other.close()


def test_what_can_not_be_had_says_so() -> None:
    with pytest.raises(ConfigError, match=r"kv\.memory_mb"):
        Arena.create(1 << 60, shared=True)
    with pytest.raises(ConfigError, match="positive"):
        Arena.create(0, shared=False)
    with Arena.create(64, shared=False) as arena, pytest.raises(ConfigError, match="shared=True"):
        arena.fileno()
