"""Launching one kernel again and again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kv_transfer.cuda import driver

if TYPE_CHECKING:
    from kv_transfer.device import DeviceRegion
    from kv_transfer.device_kernels import Kernel


class Launcher:
    """A kernel on the checksums' stream of a region, for arguments that are all aligned alike. Any thread.

    Triton looks up what it has compiled at every launch, which takes longer than all else; here it does so once.
    """

    def __init__(self, region: DeviceRegion, kernel: Kernel, num_warps: int, **constants: Any) -> None:
        """`constants`: the kernel's last parameters, in their order."""
        self._region = region
        self._kernel = kernel
        self._num_warps = num_warps
        self._constants = constants
        self._compiled: Any = None  # never under the interpreter

    def __call__(self, grid: tuple[int, int, int], *args: Any) -> None:
        """Enqueue it. The first time compiles."""
        if self._compiled is None:
            with self._region.checking():
                self._compiled = self._kernel[grid](*args, **self._constants, num_warps=self._num_warps)
        else:
            driver().bind(self._region.ordinal)
            self._compiled[grid](*args, *self._constants.values(), stream=self._region.check_handle)
