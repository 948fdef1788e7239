"""What one step computes. A plan reserves blocks; progress moves only when its results are committed."""

from __future__ import annotations

from dataclasses import dataclass, field

from llm_engine.sched.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start, start + length) of a prefilling sequence."""

    seq: Sequence
    start: int
    length: int
    is_last: bool  # after this chunk a token can be drawn

    @classmethod
    def next_of(cls, seq: Sequence, budget: int) -> Chunk:
        """The next chunk of a sequence, at most `budget` tokens."""
        length = min(seq.num_pending, budget)
        return cls(seq, seq.num_computed, length, length == seq.num_pending)

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """Who draws tokens in this step, how many drafts each may verify, and who had to make room."""

    seqs: list[Sequence] = field(default_factory=list)
    num_drafts: list[int] = field(default_factory=list)  # parallel to `seqs`
    preempted: list[Sequence] = field(default_factory=list)  # hold nothing any more
