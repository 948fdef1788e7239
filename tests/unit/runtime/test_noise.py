"""The noise is a pure function of its keys, exponential, and without structure over seeds, positions and token ids."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch

from llm_engine.ops import noise as noise_module
from llm_engine.ops.noise import ExponentialNoise, mix_seed, position_keys

CPU = torch.device("cpu")
CRITICAL_KS = 1.95  # sqrt(n)·D stays below with probability 0.999


def _noise(seeds: npt.ArrayLike, positions: npt.ArrayLike, size: int) -> npt.NDArray[np.float64]:
    keys = np.array(
        [mix_seed(int(seed)) for seed in (seeds if isinstance(seeds, list) else np.atleast_1d(seeds))], dtype=np.uint64
    )
    positions = np.atleast_1d(np.asarray(positions, dtype=np.int64))
    keys, positions = np.broadcast_arrays(keys, positions)
    return ExponentialNoise(size, CPU)(position_keys(keys, positions)).numpy().astype(np.float64)


def _ks(values: npt.NDArray[np.float64]) -> float:
    """Kolmogorov-Smirnov distance to Exp(1), scaled by sqrt(n)."""
    ordered = np.sort(values.ravel())
    n = len(ordered)
    uniform = -np.expm1(-ordered)
    grid = np.arange(n + 1) / n
    return float(max(np.max(grid[1:] - uniform), np.max(uniform - grid[:-1])) * math.sqrt(n))


def test_the_bits_are_fixed() -> None:
    """Workers of any version and machine must draw the same tokens: these values never change."""
    noise = _noise([0, 7, -1, 2**63, 2**64 - 1], [0, 1, 1000, 131071, 5], 4)
    expected = [
        [0x3F60D88C, 0x3E13FDE1, 0x3E156F21, 0x3F77BAE6],
        [0x3E9FB8BC, 0x3F12A44B, 0x3EA20581, 0x40208DFF],
        [0x4021C4A1, 0x3F615290, 0x3EE2FD87, 0x3DCA96D1],
        [0x3E30069E, 0x3EF296D6, 0x3F57E6D8, 0x3FFD57E6],
        [0x3E8624DF, 0x3F84CA7B, 0x3EB37B8E, 0x3FC53B34],
    ]
    assert noise.astype(np.float32).view(np.uint32).tolist() == expected


def _definition(seed: int, position: int, token: int) -> float:
    """The module's docstring in plain integers and double precision."""
    mask = 2**64 - 1

    def mix(x: int) -> int:
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
        return x ^ x >> 31

    key = mix(mix(seed + 0x9E3779B97F4A7C15 & mask) + position * 0xD1342543DE82EF95 & mask)
    bits = mix(key + (token + 1) * 0x9E3779B97F4A7C15 & mask)
    low, high = bits % 2**23, bits >> 23
    geometric = 23 - low.bit_length()
    return math.log(2) * geometric - math.log1p(-(high + 0.5) / 2**42)


def test_it_is_what_the_docstring_says() -> None:
    seeds, positions = np.arange(50) * 12345678901, np.arange(50)[::-1] * 77
    noise = _noise(seeds, positions, 40)
    expected = [
        [_definition(int(s), int(p), token) for token in range(40)] for s, p in zip(seeds, positions, strict=True)
    ]
    np.testing.assert_allclose(noise, expected, rtol=3e-7)


@pytest.mark.parametrize(
    ("seeds", "positions", "size"),
    [
        (np.zeros(1), np.zeros(1), 200_000),  # over the vocabulary
        (np.zeros(1), np.arange(100_000), 2),  # over positions
        (np.arange(100_000), np.zeros(1), 2),  # over seeds
        (np.arange(400), np.arange(400), 500),
    ],
)
def test_it_is_exponential_along_every_key(seeds: npt.ArrayLike, positions: npt.ArrayLike, size: int) -> None:
    noise = _noise(seeds, positions, size)
    assert _ks(noise) < CRITICAL_KS
    assert noise.min() > 0
    n = noise.size
    assert abs(noise.mean() - 1) < 4 / math.sqrt(n)
    assert abs(noise.var() - 1) < 4 * math.sqrt(8 / n)


def test_small_values_which_decide_draws_are_exponential_too() -> None:
    """Conditioned on E < 2^-8 the scaled values are again a truncated exponential; coarse steps would show here."""
    noise = _noise(np.zeros(1), np.arange(40), 100_000).ravel()
    bound = 2.0**-8
    small = noise[noise < bound]
    assert abs(len(small) / len(noise) - -math.expm1(-bound)) < 4 * math.sqrt(bound / len(noise))
    rescaled = -np.log1p(-np.expm1(-small) / np.expm1(-bound))  # uniform in (0, 1) → exponential
    assert _ks(rescaled[np.isfinite(rescaled)]) < CRITICAL_KS
    assert len(np.unique(small)) > 0.99 * len(small)


def test_the_largest_of_many_is_gumbel() -> None:
    """-ln E over a vocabulary has its maximum at ln V + Gumbel: the tail that sampling lives on."""
    noise = _noise(np.zeros(1), np.arange(20_000), 256)
    assert _ks(noise.min(axis=1) * 256) < CRITICAL_KS


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (_noise(0, np.arange(3000), 64), _noise(1, np.arange(3000), 64)),
        (_noise(0, np.arange(3000), 64), _noise(0, np.arange(1, 3001), 64)),
        (_noise(0, np.arange(3000), 65)[:, :-1], _noise(0, np.arange(3000), 65)[:, 1:]),
        (_noise(np.arange(3000), 5, 64), _noise(np.arange(3000) + 2**32, 5, 64)),
    ],
    ids=["neighbouring seeds", "neighbouring positions", "neighbouring tokens", "high bits of the seed"],
)
def test_neighbours_are_independent(first: npt.NDArray[np.float64], second: npt.NDArray[np.float64]) -> None:
    x, y = -np.expm1(-first.ravel()), -np.expm1(-second.ravel())
    table, _, _ = np.histogram2d(x, y, bins=16, range=[[0, 1], [0, 1]])
    expected = x.size / 256
    chi_square = float(((table - expected) ** 2 / expected).sum())
    assert abs(chi_square - 255) < 4 * math.sqrt(2 * 255)
    assert abs(np.corrcoef(x, y)[0, 1]) < 4 / math.sqrt(x.size)


def test_a_row_does_not_depend_on_its_batch() -> None:
    keys = position_keys(np.full(70, mix_seed(3), np.uint64), np.arange(70))
    for size in (1, 3, 61, 512):
        noise = ExponentialNoise(size, CPU)
        batch = noise(keys)
        for row in (0, 1, 33, 69):
            assert torch.equal(noise(keys[row : row + 1])[0], batch[row])
        assert torch.equal(ExponentialNoise(size + 13, CPU)(keys)[:, :size], batch)


def test_every_array_library_makes_the_same_bits() -> None:
    """What another device computes with torch is what the CPU computes with numpy."""
    states = np.random.default_rng(0).integers(-(2**63), 2**63, size=(40, 1000), dtype=np.int64)
    states[0, :3] = [0, -1, 2**63 - 1]
    by_torch = noise_module._exponential(torch.from_numpy(states.copy()), noise_module._TORCH)
    by_numpy = noise_module._exponential(states, noise_module._NUMPY)
    assert by_numpy.dtype == np.float32
    assert torch.equal(by_torch, torch.from_numpy(by_numpy))
