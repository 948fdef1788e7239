"""The integers that a recorded pass takes from the host: they cross to the device together, in one copy."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_ALIGN = 256  # bytes: where arrays start, as if each had been allocated by itself
_IN_FLIGHT = 4  # sets of inputs that may wait to leave; a step has fewer passes of one recording

Shape = tuple[int, ...]
_DTYPES: Mapping[str, tuple[torch.dtype, type[Any]]] = {
    "int64": (torch.int64, np.int64),
    "int32": (torch.int32, np.int32),
}


class Inputs:
    """Named arrays in one buffer of the device, `arrived`, and the pinned buffers of the host that it is filled from.

    On the CPU there is one buffer, which is both.
    """

    def __init__(self, arrays: Mapping[str, tuple[str, Shape]], device: torch.device) -> None:
        """`arrays`: the dtype (int64, int32) and the shape of each. They start as zeros."""
        self._places: dict[str, tuple[int, int, str, Shape]] = {}
        size = 0
        for name, (dtype, shape) in arrays.items():
            end = size + int(np.prod(shape)) * _DTYPES[dtype][0].itemsize
            self._places[name] = size, end, dtype, shape
            size = -(-end // _ALIGN) * _ALIGN
        self._buffer = torch.zeros(size, dtype=torch.uint8, device=device)
        self.arrived: dict[str, Tensor] = {
            name: self._buffer[start:end].view(_DTYPES[dtype][0]).view(shape)
            for name, (start, end, dtype, shape) in self._places.items()
        }
        self._staged: deque[tuple[Tensor, dict[str, npt.NDArray[Any]], torch.Event | None]] = deque()
        if device.type == "cpu":
            self._staged.append((self._buffer, self._views(self._buffer), None))
            return
        for host in torch.zeros(_IN_FLIGHT, size, dtype=torch.uint8, device="cpu").pin_memory():
            self._staged.append((host, self._views(host), torch.Event(device)))

    @property
    def staged(self) -> dict[str, npt.NDArray[Any]]:
        """The arrays of the host that `send` copies. They hold what was sent from them before."""
        return self._staged[0][1]

    def begin(self) -> None:
        """Make `staged` a set of arrays that may be written: what was sent from it has left.

        Waits for that, which is rare: it was sent `_IN_FLIGHT` passes ago.
        """
        self._staged.rotate()
        sent = self._staged[0][2]
        if sent is not None:
            sent.synchronize()

    def send(self) -> None:
        """Copy what was written since `begin`. Waits for nothing."""
        host, _, sent = self._staged[0]
        if sent is not None:
            self._buffer.copy_(host, non_blocking=True)
            sent.record()

    def _views(self, host: Tensor) -> dict[str, npt.NDArray[Any]]:
        values = host.numpy()
        return {
            name: values[start:end].view(_DTYPES[dtype][1]).reshape(shape)
            for name, (start, end, dtype, shape) in self._places.items()
        }
