"""Drawing tokens: argmax of softmax(logits / temperature) / E, with the exponential noise E made where it is used.

The noise is that of `ops.noise`, bit for bit: integer operations, and single fp32 ones that no compiler may fuse.
Scores are p / E without the common factor that makes p sum to one. They may differ from those of another device in the
last bits, by its exponential function; a draw differs only where two candidates tie to about 1e-6.

A row is cut into chunks of a fixed size: the largest logit of each, the best score of each under the largest of all,
then the best of the row.

Shapes: R rows, V vocabulary, C chunks.
"""

from __future__ import annotations

import math
from typing import Final

import torch
import triton.language as tl
from torch import Tensor

from llm_engine.ops.noise import ATANH_TERMS, GAMMA, GEOMETRIC_BITS, MIX_1, MIX_2
from llm_engine.ops_triton.lang import Ptr, Val, await_inputs, ceil_div, inline, kernel, let_next_in, tile_size

NOISE: Final = (GAMMA, MIX_1, MIX_2, GEOMETRIC_BITS, ATANH_TERMS, math.log(2))  # constants of `exponential`
_CHUNK: Final = 2048


def race(logits_RV: Tensor, temperature_R: Tensor, keys_R: Tensor) -> Tensor:
    """See `llm_engine.ops.spec.Race`."""
    rows, vocab = logits_RV.shape
    drawn_R2 = logits_RV.new_empty(rows, 2, dtype=torch.float64)
    if not rows:
        return drawn_R2
    chunks = ceil_div(vocab, _CHUNK)
    peaks_RC, scores_RC = logits_RV.new_empty(2, rows, chunks)
    ids_RC = logits_RV.new_empty(rows, chunks, dtype=torch.int32)
    tile, grid = tile_size(chunks), (chunks, rows)
    source = (logits_RV, temperature_R, logits_RV.stride(0), vocab)
    _peaks[grid](*source, peaks_RC, _CHUNK, num_warps=4)
    _race[grid](*source, keys_R, peaks_RC, scores_RC, ids_RC, _CHUNK, tile, *NOISE, num_warps=4, enable_fp_fusion=False)
    _winners[(rows,)](scores_RC, ids_RC, drawn_R2, chunks, tile, num_warps=1)
    return drawn_R2


@inline
def exponential(
    key: Val,
    token: Val,
    GAMMA: tl.constexpr,
    MIX_1: tl.constexpr,
    MIX_2: tl.constexpr,
    GEOMETRIC_BITS: tl.constexpr,
    TERMS: tl.constexpr,
    LN_2: tl.constexpr,
) -> Val:
    """The noise of `ops.noise` for token ids, under a key of 64 bits. For kernels that are launched without fusion."""
    bits = key + (token + 1).to(tl.uint64) * GAMMA
    bits = (bits ^ (bits >> 30)) * MIX_1
    bits = (bits ^ (bits >> 27)) * MIX_2
    bits = bits ^ (bits >> 31)
    low = (bits & ((1 << GEOMETRIC_BITS) - 1)).to(tl.int32).to(tl.float32) + 0.5
    zeros = (126 + GEOMETRIC_BITS - (low.to(tl.int32, bitcast=True) >> 23)).to(tl.float32)
    v = ((bits >> GEOMETRIC_BITS).to(tl.int64).to(tl.float32) + 0.5) * (2.0 ** (GEOMETRIC_BITS - 64))
    s = tl.div_rn(v, 4.0 - v)
    square = s * s
    series = square * (1.0 / (2 * TERMS - 1))
    for term in tl.static_range(TERMS - 2, 0, -1):
        series = (series + 1.0 / (2 * term + 1)) * square
    return zeros * LN_2 + (series + 1.0) * s * 2.0


@inline
def _scaled(logits: Ptr, temperature: Ptr, row_stride: int, vocab: int, token: Val, row: Val) -> Val:
    """logits / temperature; -inf beyond the vocabulary."""
    logit = tl.load(logits + row * row_stride + token, mask=token < vocab, other=float("-inf"))
    return tl.div_rn(logit, tl.zeros_like(logit) + tl.load(temperature + row))


@kernel
def _peaks(
    logits: Ptr,
    temperature: Ptr,
    row_stride: int,
    vocab: int,
    peaks: Ptr,
    CHUNK: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """The largest scaled logit of each chunk, NaN left out: `_race` notices it."""
    await_inputs(OVERLAP)
    let_next_in(OVERLAP)
    row, token = tl.program_id(1).to(tl.int64), tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    scaled = _scaled(logits, temperature, row_stride, vocab, token, row)
    peak = tl.max(tl.where(scaled == scaled, scaled, float("-inf")), 0)
    tl.store(peaks + row * tl.num_programs(0) + tl.program_id(0), peak)


@kernel
def _race(
    logits: Ptr,
    temperature: Ptr,
    row_stride: int,
    vocab: int,
    keys: Ptr,
    peaks: Ptr,
    scores: Ptr,
    ids: Ptr,
    CHUNK: tl.constexpr,
    C_TILE: tl.constexpr,
    GAMMA: tl.constexpr,
    MIX_1: tl.constexpr,
    MIX_2: tl.constexpr,
    GEOMETRIC_BITS: tl.constexpr,
    TERMS: tl.constexpr,
    LN_2: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """The best score of each chunk and the lowest id that has it; NaN where a logit is, or the row has no peak."""
    await_inputs(OVERLAP)
    let_next_in(OVERLAP)
    chunk, row, chunks = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(0)
    other = tl.arange(0, C_TILE)
    peak = tl.max(tl.load(peaks + row * chunks + other, mask=other < chunks, other=float("-inf")), 0)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    below = _scaled(logits, temperature, row_stride, vocab, token, row) - peak
    key = tl.load(keys + row).to(tl.uint64, bitcast=True)
    noise = exponential(key, token, GAMMA, MIX_1, MIX_2, GEOMETRIC_BITS, TERMS, LN_2)
    score = tl.where(token < vocab, tl.div_rn(tl.exp(below), noise), -1.0)
    unsound = tl.max(((below != below) & (token < vocab)).to(tl.int32), 0)
    score = tl.where(score == score, score, -1.0)
    best = tl.max(score, 0)
    tl.store(ids + row * chunks + chunk, tl.min(tl.where(score == best, token, vocab - 1), 0))
    tl.store(scores + row * chunks + chunk, tl.where(unsound != 0, float("nan"), best))


@kernel
def _winners(scores: Ptr, ids: Ptr, drawn: Ptr, num_chunks: int, C_TILE: tl.constexpr, OVERLAP: tl.constexpr) -> None:
    """The best of each row's chunks; the lowest id among equals, NaN if one of them is."""
    await_inputs(OVERLAP)
    let_next_in(OVERLAP)
    row, chunk = tl.program_id(0).to(tl.int64), tl.arange(0, C_TILE)
    there = chunk < num_chunks
    score = tl.load(scores + row * num_chunks + chunk, mask=there, other=-1.0)
    token = tl.load(ids + row * num_chunks + chunk, mask=there, other=0)
    unsound = tl.max((score != score).to(tl.int32), 0)
    score = tl.where(score == score, score, -1.0)
    best = tl.max(score, 0)
    first = tl.min(tl.where(there & (score == best), token, 0x7FFFFFFF), 0)
    tl.store(drawn + 2 * row, first.to(tl.float64))
    tl.store(drawn + 2 * row + 1, tl.where(unsound != 0, float("nan"), best).to(tl.float64))
