"""Decode passes that are recorded once and replayed: a launch a pass instead of hundreds.

A recording has a fixed shape, so there is one for every number of sequences on a ladder and every bound on the context,
made when it is first needed or by `prepare`. A batch runs on the smallest that holds it. What is left over repeats the
last sequence and writes nothing: padding wakes no expert that no real row has chosen.

Shapes: R rows, N real rows, S sequences, B blocks of the longest table.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import pairwise, product

import torch
from torch import Tensor

from llm_engine.ops import ForwardBatch, Ops

Pass = Callable[[ForwardBatch], Tensor]


class DecodeGraph:
    """One recording: `num_seqs` sequences of `rows_per_seq` rows each, none longer than `max_context` tokens."""

    def __init__(
        self, forward: Pass, ops: Ops, *, num_seqs: int, rows_per_seq: int, max_context: int, block_tokens: int
    ) -> None:
        self._rows_per_seq = rows_per_seq
        rows, blocks = num_seqs * rows_per_seq, -(-max_context // block_tokens)
        rows_R = torch.zeros(rows, dtype=torch.int64, device=ops.device)
        self._batch = ForwardBatch(
            token_ids_R=rows_R,
            positions_R=rows_R.clone(),
            slots_N=rows_R - 1,  # while recording, nothing is written
            block_tables_SB=torch.zeros(num_seqs, blocks, dtype=torch.int32, device=ops.device),
            row_starts=tuple(range(0, rows + 1, rows_per_seq)),
            context_lens=(max_context,) * num_seqs,
        )
        self._replay = ops.capture(lambda: forward(self._batch))

    def __call__(self, batch: ForwardBatch) -> Tensor:
        """Run a batch that lies on the host. The result's first N rows are valid until the next call."""
        own, count = self._batch, self._rows_per_seq
        seqs = torch.arange(own.num_seqs).clamp(max=batch.num_seqs - 1)
        rows = (seqs[:, None] * count + torch.arange(count)).flatten()
        slots_R = torch.full((own.num_rows,), -1)
        slots_R[: batch.num_rows] = batch.slots_N
        own.token_ids_R.copy_(batch.token_ids_R[rows], non_blocking=True)
        own.positions_R.copy_(batch.positions_R[rows], non_blocking=True)
        own.slots_N.copy_(slots_R, non_blocking=True)
        width = batch.block_tables_SB.shape[1]
        own.block_tables_SB[:, :width].copy_(batch.block_tables_SB[seqs], non_blocking=True)
        return self._replay()[: batch.num_rows]


class DecodeGraphs:
    """Recordings on a ladder of sizes and context bounds, over one store."""

    def __init__(
        self,
        forward: Pass,
        ops: Ops,
        *,
        rows_per_seq: int,
        num_seqs: Sequence[int],
        max_contexts: Sequence[int],
        block_tokens: int,
    ) -> None:
        """`num_seqs` and `max_contexts` ascend. Raises ValueError otherwise, or where the table pads rows."""
        for ladder in (num_seqs, max_contexts):
            if not ladder or any(low >= high for low, high in pairwise(ladder)):
                raise ValueError(f"a ladder ascends and is not empty, not {list(ladder)}")
        if ops.row_tile != 1:
            raise ValueError(f"{ops.name} pads batches to {ops.row_tile} rows: its passes can't be recorded")
        self._forward, self._ops = forward, ops
        self._rows_per_seq, self._block_tokens = rows_per_seq, block_tokens
        self._num_seqs, self._max_contexts = tuple(num_seqs), tuple(max_contexts)
        self._graphs: dict[tuple[int, int], DecodeGraph] = {}

    def prepare(self) -> None:
        """Record everything now, the largest first: smaller ones then find their memory in its pool."""
        for num_seqs, max_context in product(reversed(self._num_seqs), reversed(self._max_contexts)):
            self._graph(num_seqs, max_context)

    def run(self, batch: ForwardBatch) -> Tensor | None:
        """The pass over a batch on the host: [N, …], valid until the next call. None: no recording holds this batch."""
        counts = {end - first for first, end in pairwise(batch.row_starts)}
        size = bisect_left(self._num_seqs, batch.num_seqs)
        bound = bisect_left(self._max_contexts, max(batch.context_lens, default=0))
        if counts != {self._rows_per_seq} or size == len(self._num_seqs) or bound == len(self._max_contexts):
            return None
        return self._graph(self._num_seqs[size], self._max_contexts[bound])(batch)

    def _graph(self, num_seqs: int, max_context: int) -> DecodeGraph:
        if (num_seqs, max_context) not in self._graphs:
            self._graphs[num_seqs, max_context] = DecodeGraph(
                self._forward,
                self._ops,
                num_seqs=num_seqs,
                rows_per_seq=self._rows_per_seq,
                max_context=max_context,
                block_tokens=self._block_tokens,
            )
        return self._graphs[num_seqs, max_context]
