"""Kernels of prefill that are made for Hopper: the same results as those that serve everywhere, again and again."""

from __future__ import annotations

from functools import partial
from importlib import import_module

import pytest
import torch
from torch import Tensor

from llm_engine.ops import load_ops
from llm_engine.ops_triton.lang import for_hopper

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(100)]

_HIDDEN, _WIDTH, _EXPERTS = 7168, 2048, 12


def _routes(rows: int, card: torch.device) -> dict[str, Tensor]:
    """Two experts a row: any, one that has few rows and some that have none, and one that has half of all."""
    any_two = torch.rand(rows, _EXPERTS, device=card).topk(2, 1).indices
    few = torch.rand(rows, 4, device=card).topk(2, 1).indices
    few[:3, 0] = 7
    most = any_two.clone()
    most[:, 0] = 11
    most[:, 1] %= 11
    return {"any": any_two, "few": few, "most": most}


@pytest.mark.parametrize("rows", [641, 4096])
def test_experts_equal_the_general_kernels(rows: int, card: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if for_hopper("experts_hopper") is None:
        pytest.skip("made for another card")
    ops = load_ops("triton", "fast", "fp8")
    draw = partial(torch.randn, device=card, dtype=torch.bfloat16)
    experts = ((draw(2 * _WIDTH, _HIDDEN) * 0.02, draw(_HIDDEN, _WIDTH) * 0.02) for _ in range(_EXPERTS))
    packed, x = ops.pack_experts(experts, _EXPERTS), draw(rows, _HIDDEN)
    shares = torch.rand(rows, 2, device=card)
    routes = {name: ids.int().contiguous() for name, ids in _routes(rows, card).items()}
    special = {name: ops.moe(x, ids, shares, packed) for name, ids in routes.items()}
    for name, ids in routes.items():
        assert torch.equal(ops.moe(x, ids, shares, packed), special[name]), name
    monkeypatch.setattr(import_module("llm_engine.ops_triton.moe"), "for_hopper", lambda _name: None)
    for name, ids in routes.items():
        general = ops.moe(x, ids, shares, packed).float()
        assert ((special[name].float() - general).norm(dim=1) <= 0.005 * general.norm(dim=1)).all(), name
