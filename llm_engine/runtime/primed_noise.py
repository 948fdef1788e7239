"""Noise rows for the sampler, made once for rows that are drawn twice: as drafts and then for good."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llm_engine.ops import to_device
from llm_engine.ops.noise import ExponentialNoise


class PrimedNoise:
    """`ExponentialNoise` that remembers the rows it was last primed with. Shapes: R rows, V vocabulary."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._device = device
        self._noise = ExponentialNoise(vocab_size, device)
        self._row_of: dict[int, int] = {}  # key → row of `_noise_RV`
        self._noise_RV = torch.empty(0, vocab_size, device=device)

    def prime(self, keys_R: npt.NDArray[np.uint64] | None) -> None:
        """Make the rows of these keys in one go, and forget those made before. None: forget only."""
        self._row_of = {}
        if keys_R is not None:
            self._row_of = {key: row for row, key in enumerate(keys_R.tolist())}
            self._noise_RV = self._noise(keys_R)

    def of(self, keys_R: npt.NDArray[np.uint64]) -> Tensor:
        """fp32 [R, V], not to be changed: the noise of these keys."""
        rows = [self._row_of.get(key, -1) for key in keys_R.tolist()] if self._row_of else [-1]
        if min(rows) < 0:
            return self._noise(keys_R)
        if rows == list(range(len(self._row_of))):
            return self._noise_RV
        return self._noise_RV[to_device(torch.from_numpy(np.array(rows)), self._device)]
