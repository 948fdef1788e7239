"""One forward pass: plan → tensors → model → sampler. Knows slots and rows, nothing of queues or blocks' owners."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from llm_engine.models.spec import ModelSpec
from llm_engine.ops import ForwardBatch, to_device
from llm_engine.ops.spec import Race
from llm_engine.runtime.batch import SequenceRows, build_batch, fill_in
from llm_engine.runtime.drafts import Drafts
from llm_engine.runtime.kv_store import KvStore
from llm_engine.runtime.sampler import Drawn, DrawRows, Sampler
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

    def forward(self, batch: ForwardBatch, store: KvStore, on_layer: Callable[[int], None] | None = None) -> Tensor: ...
    def logits(self, hidden_MH: Tensor) -> Tensor: ...
    def mtp(self, batch: ForwardBatch, hidden_RH: Tensor, store: KvStore) -> Tensor: ...
    def draft_logits(self, hidden_MH: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Passed:
    """What a pass gives for N rows. Logits [N, V] and `sampler.best_of` them where they were computed along.

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

    def draft(self, batch: ForwardBatch, hidden_NH: Tensor, late_M: Tensor | None = None) -> Passed | None:
        """The MTP layer."""
        ...


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Results of one pass: rows of the decoding sequences first, then of the chunks, in the order given."""

    hidden_RH: Tensor
    starts: tuple[int, ...]  # first hidden row of each decoding sequence, then of each chunk
    drawn: Drawn
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

    def open(self, seq: Sequence) -> None:
        """Give a sequence a slot."""
        seq.slot = self._free_slots.pop()
        self.sampler.open(seq)

    def close(self, seq: Sequence) -> None:
        """Take the slot back, if there is one."""
        if seq.slot >= 0:
            self.sampler.close(seq.slot)
            self._free_slots.append(seq.slot)
            seq.slot = -1

    def run(
        self,
        decodes: Seq[Sequence],
        chunks: Seq[Chunk],
        drafts: Drafts,
        on_layer: Callable[[int], None] | None = None,
    ) -> StepOutput:
        """Compute the last token and the drafts of `decodes` and the tokens of `chunks`; draw wherever possible.

        A decoding sequence draws a token and one more for each of its drafts, a last chunk one. Waits once, for tokens
        and drafts together.
        """
        rows = [
            SequenceRows([seq.tokens[-1], *(-1 - place for place in drafts.places(seq))], seq.num_computed, seq.blocks)
            for seq in decodes
        ]
        rows += [
            SequenceRows(chunk.seq.tokens[chunk.start : chunk.end], chunk.start, chunk.seq.blocks) for chunk in chunks
        ]
        batch, late_M = self._batch(rows), drafts.ids()
        if not chunks and self._recorded is not None and (result := self._recorded.decode(batch, late_M)) is not None:
            # A copy: states are read after further passes, which reuse the recordings' memory.
            return self._draw(result.states_NH.clone(), batch.row_starts, decodes, chunks, drafts, result)
        hidden_RH = self.model.forward(self._on_device(batch, late_M), self._store, on_layer)
        return self._draw(hidden_RH, batch.row_starts, decodes, chunks, drafts)

    def mtp(self, rows: Seq[SequenceRows], hidden_NH: Tensor, late_M: Tensor | None = None) -> Passed:
        """The MTP layer over rows of (next token, hidden state). `late_M`: tokens that only the device knows."""
        batch = self._batch(rows)
        if self._recorded is not None and (result := self._recorded.draft(batch, hidden_NH, late_M)) is not None:
            return result
        padding = len(batch.token_ids_R) - len(hidden_NH)
        hidden_RH = torch.cat([hidden_NH, hidden_NH.new_zeros(padding, hidden_NH.shape[1])]) if padding else hidden_NH
        return Passed(self.model.mtp(self._on_device(batch, late_M), hidden_RH, self._store)[: len(hidden_NH)])

    def pick_drafts(self, passed: Passed, rows: DrawRows) -> Tensor:
        """A token for every row of an MTP pass, as `Sampler.pick`."""
        logits_NV = passed.logits_NV if passed.logits_NV is not None else self.model.draft_logits(passed.states_NH)
        return self.sampler.pick(logits_NV, rows, best_R2=passed.best_N2)

    def _batch(self, rows: Seq[SequenceRows]) -> ForwardBatch:
        return build_batch(rows, block_tokens=self._store.block_tokens, row_tile=self.model.row_tile)

    def _on_device(self, batch: ForwardBatch, late_M: Tensor | None) -> ForwardBatch:
        batch = batch.to(self.device)
        return batch if late_M is None else replace(batch, token_ids_R=fill_in(batch.token_ids_R, late_M))

    def _draw(
        self,
        hidden_RH: Tensor,
        starts: tuple[int, ...],
        decodes: Seq[Sequence],
        chunks: Seq[Chunk],
        drafts: Drafts,
        passed: Passed | None = None,
    ) -> StepOutput:
        num_decodes = len(decodes)
        num_decode_rows = starts[num_decodes]
        ends = [starts[num_decodes + i + 1] - 1 for i, chunk in enumerate(chunks) if chunk.is_last]
        if not num_decode_rows and not ends:
            return StepOutput(hidden_RH, starts, Drawn([], {}, []), [])
        hidden_MH = hidden_RH[:num_decode_rows]
        if ends:
            hidden_MH = torch.cat([hidden_MH, hidden_RH[to_device(torch.tensor(ends), self.device)]])
        drawing = [*decodes, *(chunk.seq for chunk in chunks if chunk.is_last)]
        counts = [1 + len(drafts.places(seq)) for seq in decodes] + [1] * len(ends)
        rows = DrawRows(drawing, [0] * len(drawing), counts, drafts)
        if passed is not None and passed.logits_NV is not None:
            drawn = self.sampler.draw(passed.logits_NV, rows, best_R2=passed.best_N2)
        else:
            drawn = self.sampler.draw(self.model.logits(hidden_MH), rows)
        drawn_starts = [*starts[:num_decodes], *range(num_decode_rows, num_decode_rows + len(ends))]
        return StepOutput(hidden_RH, starts, drawn, drawn_starts)
