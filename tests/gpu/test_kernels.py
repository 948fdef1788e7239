"""Kernels that replace others with the same results: equality at real sizes, and what each way takes when replayed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_engine.ops import load_ops
from llm_engine.ops.noise import ExponentialNoise
from llm_engine.ops_triton.race import race
from llm_engine.ops_triton.topk import choose_by_rows
from llm_engine.ops_triton.topk_chunks import choose_by_chunks, chunk_width
from llm_engine.runtime.sampler import best_of
from tests.gpu.conftest import Note

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(100)]

_REPLAYS, _CALLS = 20, 8
_VOCAB = 129_280


def _replayed_us(function: Callable[[], Any], device: torch.device) -> float:
    """Microseconds of a call among others like it in a recording, as kernels of decode run."""
    again = load_ops("triton", "fast", "bf16").capture(lambda: [function() for _ in range(_CALLS)])
    begin, end = (torch.Event(device, enable_timing=True) for _ in range(2))
    again()
    begin.record()
    for _ in range(_REPLAYS):
        again()
    end.record()
    torch.accelerator.synchronize()
    return round(1e3 * begin.elapsed_time(end) / _REPLAYS / _CALLS, 1)


def _orders(rows: int, context: int, bound: int, card: torch.device) -> dict[str, Tensor]:
    """Scores as top-k takes them, by what is hard about them; behind the context lies what would be chosen first."""
    usual = (torch.randn(rows, bound, device=card) * 2).view(torch.int32)
    orders = torch.where(usual < 0, ~usual, usual | -(1 << 31))
    ties = orders.clone()
    ties[:, 100 : context // 2 : 7] = ties[:, :1]
    best_last = torch.where(torch.arange(bound, device=card) >= context - 6000, orders | -(1 << 30), orders)
    cases = {"usual": orders, "ties": ties, "best last": best_last, "few distinct": orders >> 22 << 22}
    for case in cases.values():
        case[:, context:] = -1
    return cases


@pytest.mark.parametrize(("rows", "context", "bound"), [
    (1, 16384, 16384), (1, 65536, 65536), (1, 65536, 131072), (1, 163840, 163840), (4, 65536, 65536),
    (16, 65536, 65536), (64, 65536, 65536), (1, 3000, 131072), (16, 8192, 8192), (1024, 65536, 65536),
])  # fmt: skip
def test_every_way_to_the_top_k_equals_sorting(
    rows: int, context: int, bound: int, card: torch.device, note: Note
) -> None:
    visible = torch.full((rows,), context, dtype=torch.int32, device=card)
    chunk = chunk_width(rows, bound, 2048)
    ways = {"rows": choose_by_rows}
    if bound > 8192 and rows <= 64:
        ways |= {f"chunks_{size}": partial(choose_by_chunks, chunk=size) for size in (2048, 4096, 8192)}
    cases = _orders(rows, context, bound, card)
    for case, orders in cases.items():
        unsigned = orders[:: max(rows // 8, 1), :context].long() & 0xFFFFFFFF
        best = unsigned.sort(descending=True, stable=True).indices[:, :2048].sort().values.int()
        for name, way in ways.items():
            sel = torch.full((rows, 2048), -7, dtype=torch.int32, device=card)
            way(orders, visible, sel)
            assert torch.equal(sel[:: max(rows // 8, 1)], best), (case, name)
    times = {f"{name}_us": _replayed_us(partial(way, cases["usual"], visible, sel), card) for name, way in ways.items()}
    tied = _replayed_us(partial(choose_by_rows, cases["few distinct"], visible, sel), card)
    note(rows=rows, context=context, bound=bound, chosen=chunk, **times, few_distinct_us=tied)


@pytest.mark.parametrize("rows", [1, 4, 64, 256])
def test_draws_by_the_kernel_are_those_of_library_calls(rows: int, card: torch.device, note: Note) -> None:
    """But for ties to the last bits; the noise of the library calls is that of the CPU (`test_noise`)."""
    logits = torch.randn(rows, _VOCAB, device=card) * 4
    temperature = torch.linspace(0.2, 2.0, rows, device=card)
    keys = torch.arange(rows, device=card) * 0x1234567_89ABCDE - 99
    noise = ExponentialNoise(_VOCAB, card)(keys.cpu().numpy().view("uint64"))

    def library() -> Tensor:
        return best_of((logits / temperature.unsqueeze(1)).softmax(-1).div_(noise))

    drawn, expected = race(logits, temperature, keys), library()
    own = ((logits / temperature.unsqueeze(1)).softmax(-1) / noise).gather(1, drawn[:, :1].long())[:, 0]
    assert (own >= expected[:, 1].float() * (1 - 1e-5)).all()
    note(
        rows=rows, equal=(drawn[:, 0] == expected[:, 0]).sum().item(),
        race_us=_replayed_us(partial(race, logits, temperature, keys), card),
        library_without_noise_us=_replayed_us(library, card),
    )  # fmt: skip
