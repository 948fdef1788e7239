"""What one engine step reports to its owner, and the protocol by which finished layers leave during the step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Protocol

from llm_engine.api.handoff import FirstToken
from llm_engine.api.messages import KvEvents
from llm_engine.api.request import TokenDelta
from llm_engine.sched.sequence import Sequence


class LayerSink(Protocol):
    """Told on the step thread which cache blocks may be sent. Must not block and must not raise."""

    def started(self, seq: Sequence) -> None:
        """The first chunk of `seq` is about to be computed; `seq.blocks` holds the blocks of all its tokens."""

    def layers_ready(self, seq: Sequence, layers: range, first_block_index: int, block_ids: Seq[int]) -> None:
        """Rows of `layers` in these blocks are final: `block_ids[i]` is block `first_block_index + i` of `seq`.

        Layers 0 … L-1 are the main model's, L is the MTP layer where its planes exist. Every (layer, block) is reported
        once per sequence; prefix hits of all layers in one call, right after `started`. The last block may be partly
        filled.
        """


@dataclass(frozen=True, slots=True)
class Prefilled:
    """A prefill engine is done with a sequence: all layers were reported to the sink, its blocks are pinned."""

    seq: Sequence
    first: FirstToken
    compute_end: float  # engine clock: the last kernel of the sequence's prefill ended


@dataclass(frozen=True, slots=True)
class Failure:
    """A sequence ended without a finish: preempted (blocks ran out), draining (handed back) or internal."""

    seq: Sequence
    code: str
    reason: str
    retryable: bool


@dataclass(slots=True)
class StepStats:
    """Work of one step. `drafts[i]` and `accepted[i]` count the proposals at draft position i."""

    prefill_tokens: int = 0
    decode_tokens: int = 0  # tokens drawn for decoding sequences
    decode_rows: int = 0
    cached_tokens: int = 0  # prefix hits of the sequences started in this step
    preempted: int = 0
    evicted_blocks: int = 0
    drafts: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    prefill_s: float = 0.0  # wall time of the step if it held chunks

    def count_decodes(self, served: Iterable[tuple[int, int]]) -> None:
        """Count the drafts and the new tokens of each sequence that was served: all but one of these are drafts."""
        for (num_drafts, num_new), num_seqs in Counter(served).items():
            self.decode_rows += (1 + num_drafts) * num_seqs
            self.decode_tokens += num_new * num_seqs
            for i in range(num_drafts):
                if i == len(self.drafts):
                    self.drafts.append(0)
                    self.accepted.append(0)
                self.drafts[i] += num_seqs
                self.accepted[i] += num_seqs * (i < num_new - 1)


@dataclass(slots=True)
class StepResult:
    """Everything that happened since the previous result. A sequence is in at most one of the three lists."""

    deltas: dict[str, list[TokenDelta]] = field(default_factory=dict)  # router id → new tokens of its requests
    prefilled: list[Prefilled] = field(default_factory=list)
    finished: list[Sequence] = field(default_factory=list)  # stop, length, deadline; the last delta carries the reason
    failed: list[Failure] = field(default_factory=list)
    kv_events: KvEvents | None = None
    stats: StepStats = field(default_factory=StepStats)
