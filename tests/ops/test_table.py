from __future__ import annotations

import pytest
import torch

from llm_engine.api.errors import ConfigError
from llm_engine.ops import ForwardBatch, load_ops
from tests.ops.paged import Paged


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (("tpu", "exact", "fp32"), r"engine\.backend='tpu': expected one of cpu"),
        (("cpu", "loose", "fp32"), r"engine\.numerics='loose': expected exact or fast"),
        (("cpu", "exact", "fp8"), r"engine\.dtype='fp8': expected one of fp32, bf16"),
    ],
)
def test_an_unknown_choice_is_named(choice: tuple[str, str, str], message: str) -> None:
    backend, numerics, dtype = choice
    with pytest.raises(ConfigError, match=message):
        load_ops(backend, numerics, dtype)  # type: ignore[arg-type]


def test_kernels_do_not_compile_during_a_step() -> None:
    """An argument of another layout than announced is refused instead of compiled for."""
    ops = load_ops("cpu", "exact", "fp32")
    with pytest.raises(TypeError, match="No matching definition"):
        ops.rms_norm(torch.zeros(2, 2, 8), torch.ones(8), 1e-6)


def broken(batch: ForwardBatch, **changes: object) -> ForwardBatch:
    fields = {name: getattr(batch, name) for name in ForwardBatch.__dataclass_fields__}
    return ForwardBatch(**{**fields, **changes})


def test_check_finds_broken_batches() -> None:
    cache = Paged.random([20, 9], 16, torch.float32)
    batch = cache.batch([(0, 18, 20), (1, 8, 9)], 8)
    cases: list[dict[str, object]] = [
        {"row_starts": (0, 2)},
        {"row_starts": (0, 2, 4)},
        {"context_lens": (20, 8)},
        {"slots_N": batch.slots_N.flip(0)},
        {"block_tables_SB": torch.full_like(batch.block_tables_SB, -1)},
        {"positions_R": batch.positions_R + 1},
    ]
    for changes in cases:
        with pytest.raises(ValueError, match=r"row_starts|positions|slots"):
            broken(batch, **changes).check(8)
