"""The passes of decode that an engine records at start: verifying K drafts, catching up the draft layer, one draft.

Everything is recorded before the first request comes: a recording made later would stall what runs, and a card does not
take other work while it records.
"""

from __future__ import annotations

import logging
import time
from typing import Any, TypeVar

import torch
from torch import Tensor

from llm_engine.ops import ForwardBatch, Ops
from llm_engine.runtime.batch import States
from llm_engine.runtime.graphs import Pass, PassGraphs
from llm_engine.runtime.kv_store import KvStore
from llm_engine.runtime.ranking import best_of
from llm_engine.runtime.runner import Model, Passed

_log = logging.getLogger(__name__)

T = TypeVar("T")
Parts = tuple[Tensor, Tensor, Tensor]  # the fields of a `Passed`: states, logits, best

_FIRST_CONTEXT = 2048  # tokens
_CONTEXT_STEP = 8  # times the bound before


class Recorded:
    """See `runner.RecordedPasses`. Holds memory of its own; results are overwritten by the next pass."""

    def __init__(
        self, model: Model, store: KvStore, ops: Ops, *, num_drafts: int, max_num_seqs: int, max_len: int
    ) -> None:
        sizes, contexts = batch_ladder(max_num_seqs), context_ladder(max_len)

        def ladder(forward: Pass[T], rows_per_seq: int, **kind: Any) -> PassGraphs[T]:
            return PassGraphs(
                forward,
                ops,
                rows_per_seq=rows_per_seq,
                num_seqs=sizes,
                max_contexts=contexts,
                block_tokens=store.block_tokens,
                **kind,
            )

        def verify(batch: ForwardBatch, _: Tensor | None) -> Parts:
            hidden_RH = model.forward(batch, store)
            logits_RV = model.logits(hidden_RH)
            return hidden_RH, logits_RV, best_of(logits_RV)

        def draft(batch: ForwardBatch, state_RH: Tensor | None) -> Parts:
            assert state_RH is not None, "the pass takes states"
            rows_per_seq = batch.num_rows // batch.num_seqs
            state_SH = model.mtp(batch, state_RH, store)[rows_per_seq - 1 :: rows_per_seq].contiguous()
            logits_SV = model.draft_logits(state_SH)
            return state_SH, logits_SV, best_of(logits_SV)

        self._verify = ladder(verify, 1 + num_drafts, takes_late=num_drafts > 0)
        width = model.spec.hidden_size
        self._drafts = [
            ladder(draft, count, state_width=width, takes_late=count == 1, of_last=True)
            for count in draft_rows(num_drafts)
        ]

    @torch.inference_mode()
    def prepare(self) -> None:
        """Record everything. Takes seconds."""
        started = time.monotonic()
        self._verify.prepare()
        for graphs in self._drafts:
            graphs.prepare()
        count = len(self._verify) + sum(map(len, self._drafts))
        _log.info("%d passes of decode recorded in %.1f s", count, time.monotonic() - started)

    def decode(self, batch: ForwardBatch, late_M: Tensor | None = None) -> Passed | None:
        """`RecordedPasses`."""
        parts = self._verify.run(batch, None, late_M)
        return None if parts is None else Passed(*parts)

    def draft(self, batch: ForwardBatch, states: States, late_M: Tensor | None = None) -> Passed | None:
        """`RecordedPasses`."""
        for graphs in self._drafts:
            parts = graphs.run(batch, states, late_M)
            if parts is not None:
                return Passed(*parts)
        return None


def draft_rows(num_drafts: int) -> list[int]:
    """Rows a sequence of the draft layer's passes: all that a step may give it; one where a draft builds on a draft.

    The token of that one comes late.
    """
    if num_drafts < 2:
        return [2] if num_drafts else []
    return [1, 1 + num_drafts]


def batch_ladder(max_num_seqs: int) -> list[int]:
    """Numbers of sequences: 1, 2, 4, … and the most."""
    return sorted({min(1 << power, max_num_seqs) for power in range(max_num_seqs.bit_length() + 1)})


def context_ladder(max_len: int) -> list[int]:
    """Bounds in tokens that grow by a factor of 8, the last one being the most."""
    bounds, bound = [], _FIRST_CONTEXT
    while 2 * bound < max_len:
        bounds.append(bound)
        bound *= _CONTEXT_STEP
    return [*bounds, max_len]
