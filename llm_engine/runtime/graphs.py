"""Decode passes that are recorded once and replayed: a launch a pass instead of hundreds.

A recording has a fixed shape, so there is one for every number of sequences on a ladder and every bound on the context,
made when it is first needed or by `prepare`. A batch runs on the smallest that holds it. Sequences with fewer rows than
the recording and places that no sequence takes repeat a row and write nothing: padding wakes no expert that no real row
has chosen.

Shapes: R rows, N real rows, S sequences, B blocks of the longest table, H width of a state.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from itertools import pairwise, product
from typing import Generic, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llm_engine.ops import ForwardBatch, Ops, to_device
from llm_engine.runtime.batch import fill_in

T = TypeVar("T")  # a tensor of R rows, or a tuple of such
Pass = Callable[[ForwardBatch, Tensor | None], T]  # the second argument: states [R, H] of the rows, if it takes any

_IN_FLIGHT = 4  # passes of one recording whose inputs may wait to leave; a step has fewer


class DecodeGraph(Generic[T]):
    """One recording: `num_seqs` sequences of `rows_per_seq` rows each, none longer than `max_context` tokens."""

    def __init__(
        self,
        forward: Pass[T],
        ops: Ops,
        *,
        num_seqs: int,
        rows_per_seq: int,
        max_context: int,
        block_tokens: int,
        state_width: int = 0,
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
        self._state_RH = None
        if state_width:
            self._state_RH = torch.zeros(rows, state_width, dtype=ops.dtype, device=ops.device)
        # Inputs cross in one copy: token ids, positions and slots of all rows, then the block tables.
        on_host = ops.device.type == "cpu"
        self._arrived = torch.zeros(3 * rows + num_seqs * blocks, dtype=torch.int64, device=ops.device)
        inputs = torch.zeros(1 if on_host else _IN_FLIGHT, len(self._arrived), dtype=torch.int64, device="cpu")
        self._inputs = deque(
            (row, None if on_host else torch.Event(ops.device)) for row in (inputs if on_host else inputs.pin_memory())
        )
        self._replay: Callable[[], T] = ops.capture(lambda: forward(self._batch, self._state_RH))

    def __call__(self, batch: ForwardBatch, state_NH: Tensor | None = None, late_M: Tensor | None = None) -> T:
        """Run a batch that lies on the host. The result's N rows are valid until the next call of any recording.

        `late_M`: token ids that only the device knows, for `batch.fill_in`.
        """
        own, rows_per_seq = self._batch, self._rows_per_seq
        starts = np.array(batch.row_starts)
        counts = np.diff(starts)
        seqs = np.minimum(np.arange(own.num_seqs), batch.num_seqs - 1)
        within = np.minimum(np.arange(rows_per_seq), counts[seqs, None] - 1)
        rows = (starts[seqs, None] + within).ravel()
        real = np.zeros((own.num_seqs, rows_per_seq), dtype=bool)
        real[: batch.num_seqs] = np.arange(rows_per_seq) < counts[:, None]
        self._send(batch, rows, seqs, real.ravel(), late_M)
        full = bool((counts == rows_per_seq).all())
        kept = (
            slice(batch.num_rows) if full else to_device(torch.from_numpy(np.flatnonzero(real)), self._arrived.device)
        )
        if self._state_RH is not None:
            assert state_NH is not None, "the pass takes states"
            self._state_RH[kept] = state_NH
        return _rows(self._replay(), kept)

    def _send(
        self,
        batch: ForwardBatch,
        rows: npt.NDArray[np.int64],
        seqs: npt.NDArray[np.int64],
        real: npt.NDArray[np.bool_],
        late_M: Tensor | None,
    ) -> None:
        """Fill the recording's inputs. A buffer that they leave from is written again only after they have left."""
        own, count = self._batch, self._batch.num_rows
        self._inputs.rotate()
        inputs, sent = self._inputs[0]
        if sent is not None:
            sent.synchronize()
        host = inputs.numpy()
        host[:count] = batch.token_ids_R.numpy()[rows]
        host[count : 2 * count] = batch.positions_R.numpy()[rows]
        host[2 * count : 3 * count] = -1
        host[2 * count : 3 * count][real] = batch.slots_N.numpy()
        table = host[3 * count :].reshape(own.num_seqs, -1)
        tables_SB = batch.block_tables_SB.numpy()
        table[:, : tables_SB.shape[1]] = tables_SB[seqs]
        self._arrived.copy_(inputs, non_blocking=True)
        if sent is not None:
            sent.record()
        ids_R, positions_R, slots_N = self._arrived[: 3 * count].view(3, count)
        own.token_ids_R.copy_(ids_R if late_M is None else fill_in(ids_R, late_M))
        own.positions_R.copy_(positions_R)
        own.slots_N.copy_(slots_N)
        own.block_tables_SB.copy_(self._arrived[3 * count :].view(own.num_seqs, -1))


class PassGraphs(Generic[T]):
    """Recordings on a ladder of sizes and context bounds, over one store."""

    def __init__(
        self,
        forward: Pass[T],
        ops: Ops,
        *,
        rows_per_seq: int,
        num_seqs: Sequence[int],
        max_contexts: Sequence[int],
        block_tokens: int,
        state_width: int = 0,
    ) -> None:
        """`num_seqs` and `max_contexts` ascend. `state_width`: H of a pass that takes states, else 0.

        Raises ValueError otherwise, or where the table pads rows.
        """
        for ladder in (num_seqs, max_contexts):
            if not ladder or any(low >= high for low, high in pairwise(ladder)):
                raise ValueError(f"a ladder ascends and is not empty, not {list(ladder)}")
        if ops.row_tile != 1:
            raise ValueError(f"{ops.name} pads batches to {ops.row_tile} rows: its passes can't be recorded")
        self._forward, self._ops = forward, ops
        self._rows_per_seq, self._block_tokens = rows_per_seq, block_tokens
        self._num_seqs, self._max_contexts = tuple(num_seqs), tuple(max_contexts)
        self._state_width = state_width
        self._graphs: dict[tuple[int, int], DecodeGraph[T]] = {}

    def __len__(self) -> int:
        """Recordings made."""
        return len(self._graphs)

    def prepare(self) -> None:
        """Record everything now, the largest first: smaller ones then find their memory in its pool."""
        for num_seqs, max_context in product(reversed(self._num_seqs), reversed(self._max_contexts)):
            self._graph(num_seqs, max_context)

    def run(self, batch: ForwardBatch, state_NH: Tensor | None = None, late_M: Tensor | None = None) -> T | None:
        """The pass over a batch on the host: [N, …], valid until the next call. None: no recording holds this batch.

        `late_M`: token ids that only the device knows, for `batch.fill_in`.
        """
        most = max((end - first for first, end in pairwise(batch.row_starts)), default=0)
        size = bisect_left(self._num_seqs, batch.num_seqs)
        bound = bisect_left(self._max_contexts, max(batch.context_lens, default=0))
        if not 0 < most <= self._rows_per_seq or size == len(self._num_seqs) or bound == len(self._max_contexts):
            return None
        return self._graph(self._num_seqs[size], self._max_contexts[bound])(batch, state_NH, late_M)

    def _graph(self, num_seqs: int, max_context: int) -> DecodeGraph[T]:
        if (num_seqs, max_context) not in self._graphs:
            self._graphs[num_seqs, max_context] = DecodeGraph(
                self._forward,
                self._ops,
                num_seqs=num_seqs,
                rows_per_seq=self._rows_per_seq,
                max_context=max_context,
                block_tokens=self._block_tokens,
                state_width=self._state_width,
            )
        return self._graphs[num_seqs, max_context]


class DecodeGraphs(PassGraphs[Tensor]):
    """Of a pass that takes no states and gives one tensor."""

    def __init__(
        self,
        forward: Callable[[ForwardBatch], Tensor],
        ops: Ops,
        *,
        rows_per_seq: int,
        num_seqs: Sequence[int],
        max_contexts: Sequence[int],
        block_tokens: int,
    ) -> None:
        super().__init__(
            lambda batch, _: forward(batch),
            ops,
            rows_per_seq=rows_per_seq,
            num_seqs=num_seqs,
            max_contexts=max_contexts,
            block_tokens=block_tokens,
        )


def _rows(result: T, kept: slice | Tensor) -> T:
    if isinstance(result, Tensor):
        return cast(T, result[kept])
    return cast(T, tuple(part[kept] for part in cast(tuple[Tensor, ...], result)))
