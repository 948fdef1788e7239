"""Counters by which the programs of a launch learn which of them is the last at a tile.

Every launch finds them at zero and leaves them at zero. Launches that may run at the same time must not share them:
each stream has its own, and each set of recordings, which may be replayed on any stream.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Final

import torch
from torch import Tensor

MOST: Final = 2048  # tiles of one launch that can be counted

_own: ContextVar[Tensor | None] = ContextVar("own counters", default=None)


def counters(device: torch.device) -> Tensor:
    """MOST counters, int32, all zero for the next launch on the current stream."""
    own = _own.get()
    if own is not None and own.device == device:
        return own
    if device.type == "cpu":  # interpreted: a launch has ended when the call has
        return _of_stream(device, threading.get_ident())
    if device.type != "cuda":
        return _of_stream(device, 0)
    if torch.cuda.is_current_stream_capturing():  # a recording of somebody who has not set counters apart
        return make(device)
    return _of_stream(device, torch.cuda.current_stream(device).cuda_stream)


def make(device: torch.device) -> Tensor:
    """New counters."""
    return torch.zeros(MOST, dtype=torch.int32, device=device)


@contextmanager
def set_apart(own: Tensor) -> Iterator[None]:
    """Launches within use these counters."""
    token = _own.set(own)
    try:
        yield
    finally:
        _own.reset(token)


@cache
def _of_stream(device: torch.device, _stream: int) -> Tensor:
    return make(device)
