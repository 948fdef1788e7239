"""Draws by the kernel against those of the library calls that they stand for, and its noise bit by bit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor

from llm_engine.ops.noise import ExponentialNoise, mix_seed, position_keys
from llm_engine.ops_triton.lang import Ptr, kernel
from llm_engine.ops_triton.race import NOISE, exponential, race
from llm_engine.runtime.draws import INVALID, Drawn, DrawRows
from llm_engine.runtime.sampler import Sampler
from llm_engine.sched.sequence import Sequence
from tests.unit.sched.requests import sequence_of


@kernel
def _noise(
    keys: Ptr,
    out: Ptr,
    num_columns: int,
    TILE: tl.constexpr,
    GAMMA: tl.constexpr,
    MIX_1: tl.constexpr,
    MIX_2: tl.constexpr,
    GEOMETRIC_BITS: tl.constexpr,
    TERMS: tl.constexpr,
    LN_2: tl.constexpr,
) -> None:
    row, token = tl.program_id(0), tl.arange(0, TILE)
    key = tl.load(keys + row).to(tl.uint64, bitcast=True)
    noise = exponential(key, token, GAMMA, MIX_1, MIX_2, GEOMETRIC_BITS, TERMS, LN_2)
    tl.store(out + row * num_columns + token, noise, mask=token < num_columns)


def _keys(rows: int, seed: int = 0) -> Tensor:
    seeds = np.array([mix_seed(seed * 1000 + row) for row in range(rows)], dtype=np.uint64)
    return torch.from_numpy(position_keys(seeds, np.arange(rows) * 7919).view(np.int64)).to(torch.get_default_device())


def _expected(logits: Tensor, temperature: Tensor, keys: Tensor) -> Tensor:
    """Scores of every id, by library calls on the CPU."""
    noise = ExponentialNoise(logits.shape[1], torch.device("cpu"))(keys.cpu().numpy().view(np.uint64))
    return (logits.cpu() / temperature.cpu().unsqueeze(1)).softmax(-1) / noise


def test_noise_has_the_bits_of_the_oracle() -> None:
    keys, columns = _keys(9), 4099
    out = torch.empty(9, columns)
    _noise[(9,)](keys, out, columns, 8192, *NOISE, enable_fp_fusion=False)
    expected = ExponentialNoise(columns, torch.device("cpu"))(keys.cpu().numpy().view(np.uint64))
    assert torch.equal(out.cpu().view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("vocab", [1, 37, 2048, 2049, 9000])
def test_draws_are_those_of_library_calls(vocab: int) -> None:
    """But for ties within the rounding of the exponential function."""
    rows = 24
    logits = torch.randn(rows, vocab, generator=torch.Generator(torch.get_default_device()).manual_seed(vocab)) * 4
    logits[:, vocab - vocab // 7 :] = -math.inf
    temperature, keys = torch.linspace(0.05, 3, rows), _keys(rows, seed=vocab)
    drawn = race(logits, temperature, keys).cpu()
    expected = _expected(logits, temperature, keys)
    best = expected.max(-1).values
    own = expected.gather(1, drawn[:, :1].long()).squeeze(1)
    assert drawn[:, 1].isfinite().all()
    assert (own >= best * (1 - 1e-5)).all()
    assert (drawn[:, 0] == expected.argmax(-1)).float().mean() > 0.95


def test_a_row_draws_the_same_alone() -> None:
    logits, temperature, keys = torch.randn(6, 5000), torch.full((6,), 0.7), _keys(6)
    together = race(logits, temperature, keys)
    for row in range(6):
        at = slice(row, row + 1)
        assert torch.equal(race(logits[at], temperature[at], keys[at]), together[at])


def test_rows_that_are_not_finite_are_told() -> None:
    logits = torch.zeros(5, 5000)
    logits[0, 4] = math.nan
    logits[1, 4999] = math.inf
    logits[2] = -math.inf
    logits[3] = math.nan
    logits[4, 1:] = -math.inf
    drawn = race(logits, torch.ones(5), _keys(5)).cpu()
    assert drawn[:, 1].isfinite().tolist() == [False] * 4 + [True]
    assert drawn[4, 0] == 0
    assert (drawn[:, 0] >= 0).all()
    assert (drawn[:, 0] < 5000).all(), "an id of the vocabulary, since the draft layer may be fed with it"


def test_the_lowest_id_wins_a_tie() -> None:
    """Scores that are all infinitely small: zero."""
    logits = torch.full((1, 5000), -1e30)
    logits[0, 3000] = 1e30
    assert race(logits, torch.ones(1), _keys(1))[0, 0] == 3000
    assert race(torch.empty(0, 9), torch.ones(0), _keys(0)).shape == (0, 2)


def _draw(logits: Tensor, seqs: list[Sequence], *, by_kernel: bool) -> Drawn:
    sampler = Sampler(len(seqs), logits.shape[1], logits.device, race if by_kernel else None)
    for seq in seqs:
        sampler.open(seq)
    sampler.prime(seqs, [2] * len(seqs))
    return sampler.draw(logits, DrawRows(seqs, [0] * len(seqs), [2] * len(seqs)))


@pytest.mark.parametrize("kinds", ["s", "g", "f", "gs", "sf", "gfse", "sfe"])
def test_the_sampler_sends_it_rows_without_filters(kinds: str) -> None:
    """Greedy, sampled, filtered and edited sequences, in any mixture."""
    options: dict[str, dict[str, object]] = {
        "g": {},
        "s": {"temperature": 1.0},
        "f": {"temperature": 0.8, "top_k": 9, "top_p": 0.9},
        "e": {"temperature": 1.0, "logit_bias": {3: 2.0}},
    }
    seqs = [sequence_of([5, 6], f"r{i}", seed=i, **options[kinds[i % len(kinds)]]) for i in range(8)]
    for slot, seq in enumerate(seqs):
        seq.slot = slot
    logits = torch.randn(16, 300, generator=torch.Generator(torch.get_default_device()).manual_seed(len(kinds)))
    logits[5, 7] = math.nan
    drawn = _draw(logits, seqs, by_kernel=True)
    assert drawn.tokens == _draw(logits, seqs, by_kernel=False).tokens
    assert drawn.tokens[5] == INVALID
