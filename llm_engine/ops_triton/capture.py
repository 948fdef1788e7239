"""Recording launches as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class CudaCapture:
    """See `llm_engine.ops.spec.Capture`. All recordings share one pool: what one leaves in it the next overwrites."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self._warm_up(function)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = function()
        self._pool = graph.pool()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay

    @staticmethod
    def _warm_up(function: Callable[[], Tensor]) -> None:
        """Compile and allocate what is missing, which a recording cannot, beside the stream of others."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()
        torch.cuda.current_stream().wait_stream(stream)
