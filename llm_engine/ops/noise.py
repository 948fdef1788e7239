"""Counter-based exponential noise: a pure function of (seed, position, token id), the same bits on every device.

A 64-bit key of (seed, position) starts a SplitMix64 stream in which token id v takes the v-th output. An output becomes
an Exp(1) variate by integer operations and correctly rounded fp32 additions, multiplications and one division only:
no library logarithm, whose last bit depends on the machine, the vector width and the place in the tensor.

    E = ln2·G + X,  P(G = k) = 2^-(k+1),  X = -ln(1 - v/2) with v uniform in (0, 1]

which is the exact decomposition of an exponential at multiples of ln2. Small E, which decide draws, keep full relative
precision; E is at most 24·ln2.

SplitMix64: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llm_engine.ops.batch import to_device

GAMMA = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB
_MASK_64 = (1 << 64) - 1
_POSITION_STEP = np.uint64(0xD1342543DE82EF95)  # odd: positions of a seed never collide

GEOMETRIC_BITS = 23  # exactly representable in fp32 with one half added
_UNIFORM_BITS = 64 - GEOMETRIC_BITS
ATANH_TERMS = 7  # relative error below 2e-8 for arguments up to 1/3


def mix_seed(seed: int) -> int:
    """The key of a seed, any Python integer taken modulo 2^64, as an unsigned 64-bit integer."""
    return _mix((seed + GAMMA) & _MASK_64)


def position_keys(seed_keys: npt.NDArray[np.uint64], positions: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """One key per row from `mix_seed` keys and absolute positions."""
    x = seed_keys + positions.astype(np.uint64) * _POSITION_STEP
    x ^= x >> np.uint64(30)
    x *= np.uint64(MIX_1)
    x ^= x >> np.uint64(27)
    x *= np.uint64(MIX_2)
    x ^= x >> np.uint64(31)
    return x


@dataclass(frozen=True, slots=True)
class _Arrays:
    """What differs between the two array libraries that can run `_exponential`."""

    float32: Any
    int32: Any
    cast: Callable[[Any, Any], Any]


_NUMPY = _Arrays(np.float32, np.int32, lambda array, dtype: array.astype(dtype))
_TORCH = _Arrays(torch.float32, torch.int32, lambda tensor, dtype: tensor.to(dtype))


class ExponentialNoise:
    """Noise rows over a vocabulary of `size` ids on one device. The CPU uses numpy, which is faster on small rows."""

    def __init__(self, size: int, device: torch.device) -> None:
        steps = np.arange(1, size + 1, dtype=np.int64) * _signed(GAMMA)
        self._steps: Any = steps if device.type == "cpu" else torch.from_numpy(steps).to(device)

    def __call__(self, keys: npt.NDArray[np.uint64]) -> Tensor:
        """fp32 [R, size], every value in (0, 24·ln2 + 1e-6]."""
        keys_R1 = keys.view(np.int64)[:, None]
        if isinstance(self._steps, np.ndarray):
            return torch.from_numpy(_exponential(keys_R1 + self._steps, _NUMPY))
        out: Tensor = _exponential(to_device(torch.from_numpy(keys_R1), self._steps.device) + self._steps, _TORCH)
        return out


def _exponential(bits: Any, lib: _Arrays) -> Any:
    """Exp(1) variates from SplitMix64 states (int64), which are overwritten."""
    _xor_shift(bits, 30)
    bits *= _signed(MIX_1)
    _xor_shift(bits, 27)
    bits *= _signed(MIX_2)
    _xor_shift(bits, 31)
    low = lib.cast(bits & ((1 << GEOMETRIC_BITS) - 1), lib.int32)
    bits >>= GEOMETRIC_BITS
    bits &= (1 << _UNIFORM_BITS) - 1
    noise = _geometric(low, lib)
    noise *= math.log(2)
    noise += _truncated_exponential(bits, lib)
    return noise


def _geometric(bits: Any, lib: _Arrays) -> Any:
    """Leading zeros of `GEOMETRIC_BITS`-bit integers, as fp32: read off the fp32 exponent."""
    values = lib.cast(bits, lib.float32)
    values += 0.5
    exponents = values.view(lib.int32)
    exponents >>= 23
    return lib.cast(126 + GEOMETRIC_BITS - exponents, lib.float32)


def _truncated_exponential(bits: Any, lib: _Arrays) -> Any:
    """-ln(1 - v/2) for v = bits / 2^_UNIFORM_BITS, by 2·atanh(v / (4 - v)) as a series in fp32."""
    v = lib.cast(bits, lib.float32)
    v += 0.5
    v *= 2.0**-_UNIFORM_BITS
    s = v / (4.0 - v)
    square = s * s
    series = square * (1.0 / (2 * ATANH_TERMS - 1))
    for term in range(ATANH_TERMS - 2, 0, -1):
        series += 1.0 / (2 * term + 1)
        series *= square
    series += 1.0
    series *= s
    series *= 2.0
    return series


def _xor_shift(x: Any, shift: int) -> None:
    """x ^= x >>> shift. The shift of int64 is arithmetic, so the sign's copies are masked away."""
    x ^= (x >> shift) & ((1 << (64 - shift)) - 1)


def _mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * MIX_1) & _MASK_64
    x = ((x ^ (x >> 27)) * MIX_2) & _MASK_64
    return x ^ (x >> 31)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x
