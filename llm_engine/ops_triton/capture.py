"""What CUDA offers beyond kernels: recorded launches, and host memory fixed in its place."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from llm_engine.api.errors import ConfigError
from llm_engine.ops.spec import at_once
from llm_engine.ops_triton import arrivals

T = TypeVar("T")


def pin(host: Tensor) -> None:
    """See `llm_engine.ops.spec.Pin`. Raises ConfigError where the system refuses so much memory."""
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    error = int(runtime.cudaHostRegister(host.data_ptr(), host.nbytes, 0))
    if error:
        raise ConfigError(
            f"kv.staging_mb: {host.nbytes >> 20} MiB of host memory can't be pinned (CUDA error {error}); lower it, or "
            "raise the limit of locked memory (ulimit -l)"
        )


class CudaCapture:
    """See `llm_engine.ops.spec.Capture`. All recordings share one pool: what one leaves in it the next overwrites.

    The latest recording is kept, because a pool ends with the last of its recordings. Nor may two of them be replayed
    at the same time: they share their counters of arrivals too.
    """

    def __init__(self) -> None:
        self._latest: torch.cuda.CUDAGraph | None = None
        self._counters: Tensor | None = None
        self._beside: tuple[torch.cuda.Stream, Tensor] | None = None

    def __call__(self, function: Callable[[], T]) -> Callable[[], T]:
        self._warm_up(function)
        if self._counters is None:
            self._counters = arrivals.make(torch.device("cuda", torch.cuda.current_device()))
            self._beside = torch.cuda.Stream(), arrivals.make(self._counters.device)  # type: ignore[no-untyped-call]
        graph, counters, beside = torch.cuda.CUDAGraph(), self._counters, self._beside
        with (
            arrivals.set_apart(counters),
            torch.cuda.graph(graph, pool=None if self._latest is None else self._latest.pool()),
        ):
            result = function()
        self._latest = graph
        return partial(_replay, graph, result, (counters, beside))

    def beside(self, function: Callable[[], T]) -> Callable[[], T]:
        """See `llm_engine.ops.spec.Beside`: by a stream of its own while recording, at once otherwise."""
        if self._beside is None or not torch.cuda.is_current_stream_capturing():
            return at_once(function)
        here, (there, counters) = torch.cuda.current_stream(), self._beside
        there.wait_stream(here)
        with torch.cuda.stream(there), arrivals.set_apart(counters):
            result = function()

        def join() -> T:
            here.wait_stream(there)
            return result

        return join

    @staticmethod
    def _warm_up(function: Callable[[], object]) -> None:
        """Compile and allocate what is missing, which a recording cannot, beside the stream of others."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()
        torch.cuda.current_stream().wait_stream(stream)


def _replay(graph: torch.cuda.CUDAGraph, result: T, _counters: object) -> T:
    """Counters are kept as long as the recording that counts with them."""
    graph.replay()
    return result
