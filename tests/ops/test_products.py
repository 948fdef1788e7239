from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llm_engine.api.errors import ConfigError
from llm_engine.ops import Ops, load_ops
from llm_engine.ops_cpu.gemm import FreeGemm, PackedProduct, TiledGemm
from llm_engine.ops_cpu.self_check import check_products
from tests.ops import reference

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize(("depth", "out"), [(16, 8), (64, 64), (200, 33), (512, 576), (1100, 70)])
@pytest.mark.parametrize("rows", [1, 8, 21, 300])
def test_linear_matches_float64(ops: Ops, depth: int, out: int, rows: int) -> None:
    torch.manual_seed(depth)
    weight = (torch.randn(out, depth) / depth**0.5).to(ops.dtype)
    wide = torch.randn(rows, depth + 40).to(ops.dtype)
    x = wide[:, 8 : 8 + depth]  # rows of a wider tensor, as slices of a fused projection are
    expected = x.double() @ weight.double().T
    got = ops.linear(x, ops.pack_linear(weight))
    assert got.dtype == ops.dtype
    torch.testing.assert_close(got.double(), expected, atol=TOLERANCE[ops.dtype], rtol=TOLERANCE[ops.dtype])
    in_fp32 = ops.linear(x, ops.pack_linear(weight, fp32=True))
    assert in_fp32.dtype == torch.float32
    torch.testing.assert_close(in_fp32.double(), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("rows", [3, 17, 300])
def test_heads_match_float64(rows: int) -> None:
    torch.manual_seed(rows)
    weight = torch.randn(4, 24, 40) / 5
    x = torch.randn(rows, 4, 24).bfloat16()
    expected = torch.einsum("rhi,hio->hro", x.double(), weight.bfloat16().double())
    got = FreeGemm(torch.bfloat16).heads(weight)(x)
    torch.testing.assert_close(got.double(), expected, atol=2e-2, rtol=2e-2)


_WARM_THEN_RUN = """
import torch
from llm_engine.ops import load_ops
torch.set_num_threads(1)
with torch.inference_mode():
    ops = load_ops("cpu", "fast", "bf16")
    product = ops.pack_linear(torch.randn(64, 32).bfloat16())
    ops.warm_up(700)
    print("warm", flush=True)
    for rows in range(1, 701, 3):
        ops.linear(torch.randn(rows, 32).bfloat16(), product)
"""


def test_no_number_of_rows_compiles_after_the_warm_up() -> None:
    command = [sys.executable, "-c", _WARM_THEN_RUN]
    done = subprocess.run(
        command, env=os.environ | {"ONEDNN_VERBOSE": "2"}, capture_output=True, text=True, timeout=100, check=True
    )
    _, found, after = done.stdout.partition("warm\n")
    assert found
    assert "create:cache_miss" not in after


def test_mlp_matches_float64(ops: Ops) -> None:
    torch.manual_seed(1)
    gate_up, down = torch.randn(96, 64).to(ops.dtype) / 8, torch.randn(64, 48).to(ops.dtype) / 7
    x = torch.randn(11, 64).to(ops.dtype)
    got = ops.mlp(x, ops.pack_mlp(gate_up, down))
    tolerance = TOLERANCE[ops.dtype]
    torch.testing.assert_close(got.double(), reference.mlp(x, gate_up, down), atol=tolerance, rtol=tolerance)


@cache
def alone(dtype: str, depth: int, out: int) -> tuple[Tensor, list[tuple[Callable[[Tensor], Tensor], Tensor]]]:
    """Rows, and products with the result of every row computed alone."""
    ops = load_ops("cpu", "exact", dtype)
    torch.manual_seed(depth + out)
    linear = partial(ops.linear, packed=ops.pack_linear(torch.randn(out, depth).to(ops.dtype)))
    gate_up, down = torch.randn(2 * out, depth).to(ops.dtype), torch.randn(24, out).to(ops.dtype)
    mlp = partial(ops.mlp, packed=ops.pack_mlp(gate_up, down))
    rows = torch.randn(40, depth).to(ops.dtype)
    return rows, [(product, torch.cat([product(row[None]) for row in rows])) for product in (linear, mlp)]


SHAPES = [(16, 8), (64, 320), (256, 840), (128, 1792), (576, 64), (1536, 40)]


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_rows_do_not_feel_their_neighbours(data: st.DataObject) -> None:
    rows, products = alone(data.draw(st.sampled_from(["fp32", "bf16"])), *data.draw(st.sampled_from(SHAPES)))
    chosen = torch.tensor(data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=70)))
    together = rows[chosen].clone()
    poison = data.draw(st.sampled_from([None, torch.nan, torch.inf, 0.0]))
    if poison is not None:
        together = torch.stack([together, torch.full_like(together, poison)], 1).flatten(0, 1)
    step = 1 if poison is None else 2
    for product, expected in products:
        assert torch.equal(product(together)[::step], expected[chosen])


@pytest.mark.parametrize(("depth", "out"), SHAPES)
def test_rows_do_not_feel_the_threads(depth: int, out: int) -> None:
    rows, products = alone("fp32", depth, out)
    torch.set_num_threads(2)
    for product, expected in products:
        for count in (1, 8, 9, 40):
            assert torch.equal(product(rows[:count]), expected[:count])


@pytest.mark.parametrize("threads", [1, 2])
def test_self_check_accepts_this_machine(exact: Ops, threads: int) -> None:
    torch.set_num_threads(threads)
    exact.self_check()


class PlacedLinear:
    """Rounds a row by its place in the batch, as a library with another kernel for the rest of a tile does."""

    def __init__(self, exact: PackedProduct) -> None:
        self._exact = exact

    def __call__(self, x: Tensor, /) -> Tensor:
        y = self._exact(x)
        y[9:10] *= 1 + 2**-23
        return y


class PlacedGemm(TiledGemm):
    def linear(self, weight_OI: Tensor, out_dtype: torch.dtype) -> PackedProduct:
        return PlacedLinear(super().linear(weight_OI, out_dtype))


def test_self_check_notices_one_bit() -> None:
    with pytest.raises(ConfigError, match=r"engine\.numerics=exact.*set engine\.threads=1"):
        check_products(PlacedGemm())
