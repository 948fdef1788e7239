"""Settings of the engine that can't work are refused by name, before anything is loaded."""

from __future__ import annotations

from typing import Any

import pytest

from llm_engine.api.config import ClusterConfig, build
from llm_engine.api.errors import ConfigError
from llm_engine.runtime.recorded import batch_ladder, context_ladder, draft_rows


def config(**engine: Any) -> ClusterConfig:
    return build({"model": {"path": "unused"}, "engine": engine})


def test_the_dtype_follows_the_backend_unless_it_is_set() -> None:
    assert config().engine.computed == "fp32"
    assert config(backend="triton").engine.computed == "bf16"
    assert config(backend="triton", dtype="fp8").engine.computed == "fp8"
    assert config(dtype="bf16").engine.computed == "bf16"


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"dtype": "fp8"}, r"^engine=.*dtype=fp8 needs an accelerator: set engine.dtype to fp32 or bf16"),
        ({"backend": "cuda"}, r"^engine.backend='cuda': "),
        ({"device": -1}, r"^engine.device=-1: "),
    ],
)
def test_what_can_not_work_is_refused(engine: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        config(**engine)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("most", "sizes"), [(1, [1]), (8, [1, 2, 4, 8]), (20, [1, 2, 4, 8, 16, 20])])
def test_recordings_hold_every_batch(most: int, sizes: list[int]) -> None:
    assert batch_ladder(most) == sizes


@pytest.mark.parametrize(
    ("longest", "bounds"), [(100, [100]), (4096, [4096]), (5000, [2048, 5000]), (163840, [2048, 16384, 163840])]
)
def test_recordings_hold_every_context(longest: int, bounds: list[int]) -> None:
    assert context_ladder(longest) == bounds


@pytest.mark.parametrize(("num_drafts", "rows"), [(0, []), (1, [2]), (2, [1, 3]), (3, [1, 4])])
def test_recordings_hold_every_pass_of_the_draft_layer(num_drafts: int, rows: list[int]) -> None:
    assert draft_rows(num_drafts) == rows
