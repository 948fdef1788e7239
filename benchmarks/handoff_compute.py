"""Simulated prefill: what a step thread does between two layers, on a host or on a card."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    import torch


class Compute(Protocol):
    """One prefill at a time and thread: `begin`, `layer` for each layer, `end`."""

    def begin(self) -> Compute:
        """A prefill starts now."""
        ...

    def layer(self, seconds: float) -> None:
        """Compute one layer, or enqueue it."""
        ...

    def end(self) -> float:
        """Wait for the last kernel; when it ended, on the monotonic clock."""
        ...


class HostCompute:
    """Layers end at their due times; the thread sleeps in between."""

    def __init__(self) -> None:
        self._due = time.monotonic()

    def begin(self) -> HostCompute:
        """See Compute."""
        return HostCompute()

    def layer(self, seconds: float) -> None:
        """See Compute."""
        self._due += seconds
        time.sleep(max(0.0, self._due - time.monotonic()))

    def end(self) -> float:
        """See Compute."""
        return time.monotonic()


class DeviceCompute:
    """A kernel that spins for as long as a layer takes, on the card's compute stream: the thread runs ahead of it."""

    def __init__(self, device: torch.device) -> None:
        import torch

        self._torch = torch
        self._device = device
        torch.cuda.set_device(device)
        self._cycles_per_s = self._calibrate()

    def begin(self) -> Self:
        """See Compute."""
        self._torch.cuda.set_device(self._device)
        return self

    def layer(self, seconds: float) -> None:
        """See Compute."""
        if seconds > 0:
            self._torch.cuda._sleep(int(seconds * self._cycles_per_s))  # type: ignore[no-untyped-call]

    def end(self) -> float:
        """See Compute."""
        self._torch.cuda.current_stream(self._device).synchronize()
        return time.monotonic()

    def _calibrate(self) -> float:
        cycles = 20_000_000
        for _ in range(2):
            self._torch.cuda.synchronize(self._device)
            started = time.monotonic()
            self._torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]
            self._torch.cuda.synchronize(self._device)
        return cycles / (time.monotonic() - started)
