"""What CUDA offers beyond kernels: recorded launches, and host memory fixed in its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from llm_engine.api.errors import ConfigError
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

    def __call__(self, function: Callable[[], T]) -> Callable[[], T]:
        self._warm_up(function)
        if self._counters is None:
            self._counters = arrivals.make(torch.device("cuda", torch.cuda.current_device()))
        graph, counters = torch.cuda.CUDAGraph(), self._counters
        with (
            arrivals.set_apart(counters),
            torch.cuda.graph(graph, pool=None if self._latest is None else self._latest.pool()),
        ):
            result = function()
        self._latest = graph

        def replay() -> T:
            assert counters is not None, "kept as long as the recording that counts with them"
            graph.replay()
            return result

        return replay

    @staticmethod
    def _warm_up(function: Callable[[], object]) -> None:
        """Compile and allocate what is missing, which a recording cannot, beside the stream of others."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()
        torch.cuda.current_stream().wait_stream(stream)
