"""Decode passes that are recorded once and replayed: a launch a pass instead of hundreds.

A recording has a fixed shape, so there is one for every number of sequences on a ladder and every bound on the context,
made when it is first needed or by `prepare`. A batch runs on the smallest that holds it. Sequences with fewer rows than
the recording and places that no sequence takes repeat a row and write nothing: padding wakes no expert that no real row
has chosen.

Shapes: R rows, N real rows, S sequences, B blocks of the longest table, H width of a state.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise, product
from typing import Generic, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from llm_engine.ops import ForwardBatch, Ops
from llm_engine.runtime.batch import Ints, States
from llm_engine.runtime.inputs import Inputs, Shape

T = TypeVar("T")  # a tensor of results, or a tuple of such
Pass = Callable[[ForwardBatch, Tensor | None], T]  # the second argument: states [R, H] of the rows, if it takes any


class DecodeGraph(Generic[T]):
    """One recording: `num_seqs` sequences of `rows_per_seq` rows each, none longer than `max_context` tokens.

    `num_late`: the most token ids that come late. `of_last`: see `PassGraphs`.
    """

    def __init__(
        self,
        forward: Pass[T],
        ops: Ops,
        *,
        num_seqs: int,
        rows_per_seq: int,
        max_context: int,
        block_tokens: int,
        state_width: int,
        num_late: int,
        of_last: bool,
    ) -> None:
        self._rows_per_seq, self._num_late, self._of_last = rows_per_seq, num_late, of_last
        rows, blocks = num_seqs * rows_per_seq, -(-max_context // block_tokens)
        names = ("token_ids", "positions", "slots", "states", "kept")
        arrays: dict[str, tuple[str, Shape]] = dict.fromkeys(names, ("int64", (rows,)))
        arrays["tables"] = "int32", (num_seqs, blocks)
        if num_late:  # late ones behind those that the host knows, and where each row finds its own
            arrays["token_ids"] = "int64", (rows + num_late,)
            arrays["token_at"] = "int64", (rows,)
        self._inputs = Inputs(arrays, ops.device)
        arrived = self._inputs.arrived
        arrived["slots"].fill_(-1)  # while recording, nothing is written
        self._batch = ForwardBatch(
            token_ids_R=arrived["token_ids"][:rows],
            positions_R=arrived["positions"],
            slots_N=arrived["slots"],
            block_tables_SB=arrived["tables"],
            row_starts=tuple(range(0, rows + 1, rows_per_seq)),
            context_lens=(max_context,) * num_seqs,
        )
        self._state_RH = None
        if state_width:
            self._state_RH = torch.zeros(rows, state_width, dtype=ops.dtype, device=ops.device)
        self._replay: Callable[[], T] = ops.capture(lambda: forward(self._arrived(), self._state_RH))

    def __call__(self, batch: ForwardBatch, states: States | None = None, late_M: Tensor | None = None) -> T:
        """Run a batch that lies on the host; the results of its N rows, or of the last row of each sequence.

        They are valid until the next call of any recording. `late_M`: token ids that only the device knows, as for
        `batch.fill_in`.
        """
        places_N = self._fill(batch, states)
        kept = slice(batch.num_seqs) if self._of_last else self._keep(places_N)
        self._inputs.send()
        arrived = self._inputs.arrived
        if late_M is not None:
            assert len(late_M) <= self._num_late, "so many tokens that only the device knows were not foreseen"
            rows = self._batch.num_rows
            arrived["token_ids"][rows : rows + len(late_M)].copy_(late_M)
        if self._state_RH is not None:
            assert states is not None, "the pass takes states"
            torch.index_select(states.source_MH, 0, arrived["states"], out=self._state_RH)
        return _rows(self._replay(), kept)

    def _arrived(self) -> ForwardBatch:
        """The recording's batch, every row with its token."""
        if not self._num_late:
            return self._batch
        arrived = self._inputs.arrived
        return replace(self._batch, token_ids_R=arrived["token_ids"].index_select(0, arrived["token_at"]))

    def _fill(self, batch: ForwardBatch, states: States | None) -> Ints:
        """Write the inputs of all rows of the recording; returns which of them are the N rows of the batch."""
        num_seqs, rows_per_seq = self._batch.num_seqs, self._rows_per_seq
        starts = np.array(batch.row_starts)
        counts = np.diff(starts)
        seqs = np.minimum(np.arange(num_seqs), batch.num_seqs - 1)
        within = np.arange(rows_per_seq)
        rows = (starts[seqs, None] + np.minimum(within, counts[seqs, None] - 1)).ravel()
        places_N = np.flatnonzero(within < counts[:, None])
        self._inputs.begin()
        inputs = self._inputs.staged
        ids = batch.token_ids_R.numpy()[rows]
        inputs["token_ids"][: len(ids)] = ids
        if self._num_late:
            inputs["token_at"][:] = np.where(ids < 0, len(ids) - 1 - ids, np.arange(len(ids)))
        inputs["positions"][:] = batch.positions_R.numpy()[rows]
        inputs["slots"][:] = -1
        inputs["slots"][places_N] = batch.slots_N.numpy()
        tables_SB = batch.block_tables_SB.numpy()
        inputs["tables"][:, : tables_SB.shape[1]] = tables_SB[seqs]
        if states is not None:
            inputs["states"][:] = states.at_N[rows]
        return places_N

    def _keep(self, places: Ints) -> slice | Tensor:
        """Where the results at some places lie, as an index that is known to the device."""
        count = len(places)
        if (places == np.arange(count)).all():
            return slice(count)
        self._inputs.staged["kept"][:count] = places
        return self._inputs.arrived["kept"][:count]


class PassGraphs(Generic[T]):
    """Recordings on a ladder of sizes and context bounds, over one store.

    `takes_late`: some tokens may be known to the device only, which may know some that no row has. `of_last`: the pass
    gives results [S, …] of the last row of each sequence instead of every row's.
    """

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
        takes_late: bool = False,
        of_last: bool = False,
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
        self._state_width, self._takes_late, self._of_last = state_width, takes_late, of_last
        self._graphs: dict[tuple[int, int], DecodeGraph[T]] = {}

    def __len__(self) -> int:
        """Recordings made."""
        return len(self._graphs)

    def prepare(self) -> None:
        """Record everything now, the largest first: smaller ones then find their memory in its pool."""
        for num_seqs, max_context in product(reversed(self._num_seqs), reversed(self._max_contexts)):
            self._graph(num_seqs, max_context)

    def run(self, batch: ForwardBatch, states: States | None = None, late_M: Tensor | None = None) -> T | None:
        """The pass over a batch on the host: [N, …] or, `of_last`, [S, …], valid until the next call.

        None: no recording holds this batch. `late_M`: token ids that only the device knows, as for `batch.fill_in`.
        """
        most = max(map(int.__sub__, batch.row_starts[1:], batch.row_starts), default=0)
        size = bisect_left(self._num_seqs, batch.num_seqs)
        bound = bisect_left(self._max_contexts, max(batch.context_lens, default=0))
        if not 0 < most <= self._rows_per_seq or size == len(self._num_seqs) or bound == len(self._max_contexts):
            return None
        return self._graph(self._num_seqs[size], self._max_contexts[bound])(batch, states, late_M)

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
                num_late=self._num_seqs[-1] * self._rows_per_seq if self._takes_late else 0,
                of_last=self._of_last,
            )
        return self._graphs[num_seqs, max_context]


def _rows(result: T, kept: slice | Tensor) -> T:
    if isinstance(result, Tensor):
        return cast(T, result[kept])
    return cast(T, tuple(part[kept] for part in cast(tuple[Tensor, ...], result)))
