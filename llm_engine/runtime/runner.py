"""One forward pass: plan → tensors → model → sampler. Knows slots and rows, nothing of queues or blocks' owners."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from llm_engine.models.spec import ModelSpec
from llm_engine.ops import ForwardBatch, to_device
from llm_engine.ops.spec import Race
from llm_engine.runtime.batch import BlockTables, Ints, States, Tables, batch_of, fill_in
from llm_engine.runtime.drafts import Drafts
from llm_engine.runtime.draws import Drawing, Drawn, DrawRows
from llm_engine.runtime.kv_store import KvStore
from llm_engine.runtime.sampler import Sampler
from llm_engine.sched.plan import Chunk
from llm_engine.sched.sequence import Sequence


class Model(Protocol):
    """What the engine needs of a model. R rows (padding included), M any rows, H hidden, V vocabulary."""

    @property
    def spec(self) -> ModelSpec: ...
    @property
    def max_len(self) -> int: ...
    @property
    def row_tile(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...  # of hidden states
    @property
    def has_mtp(self) -> bool: ...

    def forward(self, batch: ForwardBatch, store: KvStore, on_layer: Callable[[int], None] | None = None) -> Tensor:
        """Hidden states [R, H]. `on_layer(i)` is called once the storing of layer i's cache rows is launched."""
        ...

    def logits(self, hidden_MH: Tensor) -> Tensor:
        """fp32 [M, V] of any rows of `forward`'s result."""
        ...

    def mtp(self, batch: ForwardBatch, hidden_RH: Tensor, store: KvStore) -> Tensor:
        """States [R, H] of the MTP layer. Row i holds token i + 1, position i and the hidden state of position i."""
        ...

    def draft_logits(self, hidden_MH: Tensor) -> Tensor:
        """fp32 [M, V] of any rows of `mtp`'s result."""
        ...


@dataclass(frozen=True, slots=True)
class Passed:
    """What a pass gives for N rows. Logits [N, V] and `ranking.best_of` them where they were computed along.

    Valid until the next pass, unless it was launched kernel by kernel.
    """

    states_NH: Tensor
    logits_NV: Tensor | None = None
    best_N2: Tensor | None = None

    def rows(self, index: Tensor) -> Passed:
        """Some of them."""
        logits, best = self.logits_NV, self.best_N2
        return Passed(
            self.states_NH[index], None if logits is None else logits[index], None if best is None else best[index]
        )


class RecordedPasses(Protocol):
    """Passes of decode that were recorded, logits and all. None: no recording holds the batch. H hidden.

    `late_M`: token ids that only the device knows, for `batch.fill_in`.
    """

    def decode(self, batch: ForwardBatch, late_M: Tensor | None = None) -> Passed | None:
        """The main model."""
        ...

    def draft(self, batch: ForwardBatch, states: States, late_M: Tensor | None = None) -> Passed | None:
        """The MTP layer: the last row of each sequence."""
        ...


@dataclass(frozen=True, slots=True)
class Launched:
    """A pass that the device may still be computing. `starts`, `drawn_starts`: see `StepOutput`."""

    hidden_RH: Tensor
    starts: tuple[int, ...]
    drawing: Drawing | None  # None: nothing is drawn
    drawn_starts: list[int]


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Results of one pass: rows of the decoding sequences first, then of the chunks, in the order given."""

    hidden_RH: Tensor
    starts: tuple[int, ...]  # first hidden row of each decoding sequence, then of each chunk; then the end
    drawn: Drawn | None  # None: nothing was
    drawn_starts: list[int]  # first drawn row of each decoding sequence, then of each chunk that is a last one


class Runner:
    """Drives one model over one store. A sequence needs a slot (`open`) while it takes part in passes.

    Batches are built on the host and cross to the store's device. `recorded`: passes of decode that need not be
    launched kernel by kernel. `race`: the sampler's.
    """

    def __init__(
        self,
        model: Model,
        store: KvStore,
        num_slots: int,
        recorded: RecordedPasses | None = None,
        race: Race | None = None,
    ) -> None:
        self.model = model
        self.device = store.device
        self.sampler = Sampler(num_slots, model.spec.vocab_size, store.device, race)
        self._store = store
        self._recorded = recorded
        self._free_slots = list(range(num_slots))[::-1]
        longest = min(model.max_len, store.num_blocks * store.block_tokens)
        self._tables = BlockTables(num_slots, -(-longest // store.block_tokens))

    def open(self, seq: Sequence) -> None:
        """Give a sequence a slot."""
        seq.slot = self._free_slots.pop()
        self.sampler.open(seq)
        self._tables.open(seq.slot)

    def close(self, seq: Sequence) -> None:
        """Take the slot back, if there is one."""
        if seq.slot >= 0:
            self.sampler.close(seq.slot)
            self._free_slots.append(seq.slot)
            seq.slot = -1

    def launch(
        self,
        decodes: Seq[Sequence],
        chunks: Seq[Chunk],
        drafts: Drafts,
        on_layer: Callable[[int], None] | None = None,
    ) -> Launched:
        """Compute the last token and the drafts of `decodes` and the tokens of `chunks`; draw wherever possible.

        A decoding sequence draws a token and one more for each of its drafts, a last chunk one. Waits for nothing.
        """
        batch, late_M = self._step_batch(decodes, chunks, drafts), drafts.ids()
        if not chunks:
            return self.draw(self.forward(batch, late_M), batch, decodes, [], drafts)
        passed = Passed(self.model.forward(self._on_device(batch, late_M), self._store, on_layer))
        return self.draw(passed, batch, decodes, chunks, drafts)

    def forward(self, batch: ForwardBatch, late_M: Tensor | None = None) -> Passed:
        """The main model over rows of decoding sequences. `late_M`: tokens that only the device knows."""
        if self._recorded is not None and (result := self._recorded.decode(batch, late_M)) is not None:
            # A copy: states are read after further passes, which reuse the recordings' memory.
            return replace(result, states_NH=result.states_NH.clone())
        return Passed(self.model.forward(self._on_device(batch, late_M), self._store))

    def draw(
        self, passed: Passed, batch: ForwardBatch, decodes: Seq[Sequence], chunks: Seq[Chunk], drafts: Drafts
    ) -> Launched:
        """Launch the draw that belongs to a pass over `batch`: of the rows of `decodes` and the ends of last chunks."""
        hidden_RH = passed.states_NH
        starts, num_decodes = batch.row_starts, len(decodes)
        num_decode_rows = starts[num_decodes]
        ends = [starts[num_decodes + i + 1] - 1 for i, chunk in enumerate(chunks) if chunk.is_last]
        if not num_decode_rows and not ends:
            return Launched(hidden_RH, starts, None, [])
        drawing = [*decodes, *(chunk.seq for chunk in chunks if chunk.is_last)]
        counts = [*map(int.__sub__, starts[1 : num_decodes + 1], starts[:num_decodes]), *([1] * len(ends))]
        rows = DrawRows(drawing, [0] * len(drawing), counts, drafts)
        drawn_starts = [*starts[:num_decodes], *range(num_decode_rows, num_decode_rows + len(ends))]
        if passed.logits_NV is not None:
            started = self.sampler.start(passed.logits_NV, rows, best_R2=passed.best_N2)
            return Launched(hidden_RH, starts, started, drawn_starts)
        hidden_MH = hidden_RH[:num_decode_rows]
        if ends:
            hidden_MH = torch.cat([hidden_MH, hidden_RH[to_device(torch.tensor(ends), self.device)]])
        return Launched(hidden_RH, starts, self.sampler.start(self.model.logits(hidden_MH), rows), drawn_starts)

    def finish(self, launched: Launched) -> StepOutput:
        """Wait for a pass: once, for tokens and drafts together, unless log probabilities are asked for.

        One that draws nothing is not waited for: what the device is given next comes after it.
        """
        drawn = None if launched.drawing is None else self.sampler.finish(launched.drawing)
        return StepOutput(launched.hidden_RH, launched.starts, drawn, launched.drawn_starts)

    def mtp(self, batch: ForwardBatch, states: States, *, late_M: Tensor | None = None) -> Passed:
        """The MTP layer over rows of (next token, state); what it gives for the last row of each sequence.

        `late_M`: tokens that only the device knows.
        """
        if self._recorded is not None and (result := self._recorded.draft(batch, states, late_M)) is not None:
            return result
        hidden_NH = states.gather()
        padding = len(batch.token_ids_R) - len(hidden_NH)
        hidden_RH = torch.cat([hidden_NH, hidden_NH.new_zeros(padding, hidden_NH.shape[1])]) if padding else hidden_NH
        result_RH = self.model.mtp(self._on_device(batch, late_M), hidden_RH, self._store)
        return Passed(States(result_RH, np.array(batch.row_starts[1:]) - 1).gather())

    def pick_drafts(self, passed: Passed, rows: DrawRows) -> Tensor:
        """A token for every row of an MTP pass, as `Sampler.pick`."""
        logits_NV = passed.logits_NV if passed.logits_NV is not None else self.model.draft_logits(passed.states_NH)
        return self.sampler.pick(logits_NV, rows, best_R2=passed.best_N2)

    def tables(self, seqs: Seq[Sequence], most_tokens: int) -> Tables:
        """Block tables that cover as many tokens of each sequence, as far as it has blocks."""
        return self._tables.of(seqs, -(-most_tokens // self._store.block_tokens))

    def batch(
        self, seqs: Seq[Sequence], token_ids_N: Ints, counts_S: Ints, first_S: Ints, tables_SB: Tables | None = None
    ) -> ForwardBatch:
        """`counts_S[i]` rows of sequence i from position `first_S[i]` on. `tables_SB`: theirs, if they are known."""
        if tables_SB is None:
            tables_SB = self.tables(seqs, int((first_S + counts_S).max(initial=0)))
        return batch_of(
            token_ids_N,
            counts_S,
            first_S,
            tables_SB,
            block_tokens=self._store.block_tokens,
            row_tile=self.model.row_tile,
        )

    def _step_batch(self, decodes: Seq[Sequence], chunks: Seq[Chunk], drafts: Drafts) -> ForwardBatch:
        """Rows of each decoding sequence, its last token and its drafts, which only the device knows; of each chunk."""
        ids = np.array([seq.tokens[-1] for seq in decodes], dtype=np.int64)
        first = np.array([seq.num_computed for seq in decodes], dtype=np.int64)
        counts = np.ones_like(ids)
        if len(drafts):
            places_SK = drafts.places_of(decodes)
            there = np.concatenate([counts[:, None] > 0, places_SK >= 0], axis=1)
            ids = np.concatenate([ids[:, None], -1 - places_SK], axis=1)[there]
            counts = there.sum(1)
        if not chunks:
            return self.batch(decodes, ids, counts, first)
        return self.batch(
            [*decodes, *(chunk.seq for chunk in chunks)],
            np.concatenate([ids, *(chunk.seq.tokens[chunk.start : chunk.end] for chunk in chunks)], dtype=np.int64),
            np.append(counts, [chunk.length for chunk in chunks]),
            np.append(first, [chunk.start for chunk in chunks]),
        )

    def _on_device(self, batch: ForwardBatch, late_M: Tensor | None) -> ForwardBatch:
        batch = batch.to(self.device)
        return batch if late_M is None else replace(batch, token_ids_R=fill_in(batch.token_ids_R, late_M))
