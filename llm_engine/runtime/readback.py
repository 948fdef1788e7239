"""Results on their way from the device to the host, which nobody needs to wait for until they are needed."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor


class Readback:
    """A copy of `values` that the device makes when it has computed them."""

    def __init__(self, values: Tensor) -> None:
        self._host, self._made = values, None
        if values.device.type not in ("cpu", "meta"):
            self._host = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._made = torch.Event(values.device)
            self._made.record()

    def wait(self) -> npt.NDArray[Any]:
        """The values, and with them the end of everything that was launched before.

        However long that takes: where a device hangs the step loop makes no progress, which the worker's health tells.
        """
        if self._made is not None:
            self._made.synchronize()
        return self._host.cpu().numpy()
