"""Kernels that replace others with the same results: equality at real sizes, and what each way takes when replayed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_engine.ops import ForwardBatch, load_ops
from llm_engine.ops.noise import ExponentialNoise
from llm_engine.ops_triton import mla
from llm_engine.ops_triton.race import race
from llm_engine.ops_triton.topk import choose_by_rows
from llm_engine.ops_triton.topk_chunks import choose_by_chunks, chunk_width
from llm_engine.runtime.ranking import best_of
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


def _attention(format: str, num_seqs: int, rows: int, context: int, card: torch.device) -> Callable[[], Tensor]:
    """Attention of the last `rows` rows of each of some sequences, every row over 2,048 keys at most.

    Contexts of no more than that come without a selection.
    """
    ops, block, int32 = load_ops("triton", "fast", "bf16"), 64, torch.int32
    blocks, total = context // block, num_seqs * rows
    positions = torch.arange(context - rows, context, device=card).repeat(num_seqs)
    keys = torch.randn(num_seqs * context, 576, device=card, dtype=torch.bfloat16)
    width, dtype = (656, torch.uint8) if format == "fp8" else (576, torch.bfloat16)
    plane = torch.zeros(num_seqs * blocks, block, width, dtype=dtype, device=card)
    tables = torch.randperm(num_seqs * blocks, device=card).to(int32).view(num_seqs, blocks)
    angles = torch.rand(context, 32, device=card) * 6
    make_plan = partial(ops.plan, block_tokens=block, cos_TJ=angles.cos(), sin_TJ=angles.sin())
    place = torch.arange(context, device=card).repeat(num_seqs)
    slots = tables.long().repeat_interleave(block, 1).flatten() * block + place % block
    everything = ForwardBatch(
        token_ids_R=place, positions_R=place, slots_N=slots, block_tables_SB=tables,
        row_starts=tuple(range(0, len(place) + 1, context)), context_lens=(context,) * num_seqs,
    )  # fmt: skip
    ops.write_latent(plane, keys, torch.ones(512, device=card, dtype=torch.bfloat16), 1e-6, make_plan(everything))
    last = ForwardBatch(
        token_ids_R=positions, positions_R=positions, slots_N=torch.full_like(positions, -1), block_tables_SB=tables,
        row_starts=tuple(range(0, total + 1, rows)), context_lens=(context,) * num_seqs,
    )  # fmt: skip
    plan = make_plan(last)
    chance = torch.rand(total, context, device=card).masked_fill_(
        torch.arange(context, device=card) > positions[:, None], -1.0
    )
    chosen = chance.topk(min(2048, context), 1)
    sel = torch.where(chosen.values >= 0, chosen.indices, context).sort(1).values
    sel = None if context <= 2048 else torch.where(sel < context, sel, -1).to(int32)
    query = torch.randn(total, 128, 192, device=card, dtype=torch.bfloat16)
    halves = (torch.randn(128, 128, 512, device=card, dtype=torch.bfloat16) * 0.05 for _ in range(2))
    return partial(ops.mla_attend, query, plane, plan, sel, ops.pack_kv_b(*halves), 0.1)


@pytest.mark.parametrize("format", ["bf16", "fp8"])
@pytest.mark.parametrize(("num_seqs", "rows", "context"), [
    (1, 4096, 4096), (3, 77, 2112), (1, 4096, 32768), (1, 1, 4096), (1, 1, 1024), (5, 3, 960), (16, 1, 8192),
    (64, 1, 4096), (96, 1, 2112),
])  # fmt: skip
def test_attention_for_hopper_equals_the_general_kernel(
    format: str, num_seqs: int, rows: int, context: int, card: torch.device, note: Note, monkeypatch: pytest.MonkeyPatch
) -> None:
    attend, rowwise = _attention(format, num_seqs, rows, context, card), {"dim": (1, 2)}
    if mla.for_hopper("attend_hopper") is None:
        pytest.skip("made for another card")
    special, again = attend(), attend()
    times = {"special_us": _replayed_us(attend, card)}
    monkeypatch.setattr(mla, "for_hopper", lambda _name: None)
    general = attend().float()
    times["general_us"] = _replayed_us(attend, card)
    assert torch.equal(special, again)
    assert ((special.float() - general).norm(**rowwise) <= 0.01 * general.norm(**rowwise)).all()
    note(format=format, num_seqs=num_seqs, rows=rows, context=context, **times)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("depth", "width"), [(7168, 2240), (7168, 256), (16384, 7168)])
def test_split_products_give_the_same_bits_under_load(
    depth: int, width: int, fp8: bool, card: torch.device, note: Note
) -> None:
    """Eager, replayed, behind each other and beside the same product on another stream: equal, and right."""
    ops = load_ops("triton", "fast", "fp8" if fp8 else "bf16")
    torch.manual_seed(0)
    x = torch.randn(3, depth, device=card, dtype=torch.bfloat16)
    x *= torch.logspace(-2, 2, depth // 128, device=card).repeat_interleave(128).bfloat16()
    weight = torch.randn(width, depth, device=card) / depth**0.5
    packed = ops.pack_linear(weight.bfloat16() if fp8 else weight, fp32=not fp8)
    first = ops.linear(x, packed)
    if not fp8:
        expected = x.double() @ weight.double().T
        assert (first.double() - expected).abs().max() < 1e-4 * expected.abs().max()
    again = ops.capture(lambda: [ops.linear(x, packed) for _ in range(_CALLS)])
    beside = torch.cuda.Stream()
    load, got = torch.randn(4096, 4096, device=card), []
    beside.wait_stream(torch.cuda.current_stream())
    for _ in range(200 // _CALLS):
        with torch.cuda.stream(beside):
            got += [load @ load, *(ops.linear(x, packed) for _ in range(_CALLS))][1:]
        got += [ops.linear(x, packed) for _ in range(_CALLS)]
        got += [out.clone() for out in again()]
    torch.accelerator.synchronize()
    assert all(torch.equal(out, first) for out in got)
    note(depth=depth, width=width, fp8=fp8, equal=len(got), us=_replayed_us(partial(ops.linear, x, packed), card))


@pytest.mark.parametrize("context", [1024, 2048])
def test_attention_of_a_row_ends_in_one_launch(
    context: int, card: torch.device, note: Note, monkeypatch: pytest.MonkeyPatch
) -> None:
    attend = _attention("fp8", 1, 1, context, card)
    at_once, times = attend(), {"at_once_us": _replayed_us(attend, card)}
    monkeypatch.setattr(mla, "serves", lambda *_: False)
    apart = attend()
    assert (at_once.float() - apart.float()).norm() <= 0.01 * apart.float().norm()
    note(context=context, **times, apart_us=_replayed_us(attend, card))


def test_what_runs_beside_is_waited_for(card: torch.device) -> None:
    """Two chains of split products in a recording give what they give one after the other, replay after replay."""
    ops = load_ops("triton", "fast", "fp8")
    torch.manual_seed(0)
    x, weight = torch.randn(3, 7168, device=card).bfloat16(), torch.randn(7168, 7168, device=card).bfloat16() / 85
    packed = ops.pack_linear(weight)

    def chain(row: Tensor) -> Tensor:
        for _ in range(_CALLS):
            row = ops.linear(row, packed)
        return row

    def both() -> tuple[Tensor, Tensor]:
        begun = ops.beside(partial(chain, x))
        own = chain(-x)
        return begun(), own

    expected, again = both(), ops.capture(both)
    for _ in range(20):
        got = again()
        assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))
        for out in got:
            out.fill_(torch.nan)
