from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llm_engine import ops_cpu
from llm_engine.api.errors import ConfigError
from llm_engine.ops import ForwardBatch, GateConfig, Ops, load_ops
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


def test_an_empty_batch_passes_through(ops: Ops) -> None:
    """A rank with nothing to do still takes part in every step."""
    batch = ForwardBatch(
        token_ids_R=torch.empty(0, dtype=torch.int64),
        positions_R=torch.empty(0, dtype=torch.int64),
        slots_N=torch.empty(0, dtype=torch.int64),
        block_tables_SB=torch.empty(0, 0, dtype=torch.int32),
        row_starts=(0,),
        context_lens=(),
    )
    plan = ops.plan(batch, block_tokens=8, cos_TJ=torch.zeros(4, 8), sin_TJ=torch.zeros(4, 8))
    latent, index = torch.zeros(2, 8, 56, dtype=ops.dtype), torch.zeros(2, 8, 24, dtype=ops.dtype)
    rows = torch.empty(0, 56, dtype=ops.dtype)
    ops.write_latent(latent, rows, torch.ones(40), 1e-6, plan)
    ops.write_index_keys(index, rows[:, :24], torch.ones(24), torch.ones(24), 1e-6, plan)
    assert ops.index_topk(rows[:, :48].view(0, 2, 24), rows[:, :2], index, plan, 4) is None
    kv_b = ops.pack_kv_b(torch.zeros(2, 8, 40), torch.zeros(2, 16, 40))
    assert ops.mla_attend(rows[:, :48].view(0, 2, 24), latent, plan, None, kv_b, 1.0).shape == (0, 2, 16)
    assert ops.linear(rows, ops.pack_linear(torch.zeros(5, 56))).shape == (0, 5)
    ids, weights = ops.gate(torch.empty(0, 4), torch.zeros(4), GateConfig(top_k=2))
    experts = ops.pack_experts([(torch.zeros(32, 56), torch.zeros(56, 16))] * 4, 4)
    assert ops.moe(rows, ids, weights, experts).shape == (0, 56)


def test_machine_code_is_kept_by_the_state_of_all_kernel_sources(tmp_path: Path) -> None:
    """A piece compiled into kernels of other files takes them along when it changes."""
    package = Path(ops_cpu.__file__).parent
    copy = tmp_path / "llm_engine" / "ops_cpu"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))

    def cache_dir() -> str:
        load = f"import runpy; print(runpy.run_path({str(copy / 'jit.py')!r})['_settings']['CACHE_DIR'])"
        done = subprocess.run([sys.executable, "-c", load], capture_output=True, text=True, check=True, timeout=60)
        return done.stdout.strip()

    before = cache_dir()
    assert cache_dir() == before
    assert before.startswith(str(copy))
    (copy / "norm.py").write_text((copy / "norm.py").read_text() + "\n# changed\n")
    assert cache_dir() != before
