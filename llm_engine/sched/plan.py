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

    @property
    def end(self) -> int:
        return self.start + self.length

    @property
    def is_last(self) -> bool:
        """After this chunk a token can be drawn."""
        return self.end == len(self.seq.tokens)


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """Who draws tokens in this step, how many drafts each may verify, and who had to make room."""

    seqs: list[Sequence] = field(default_factory=list)
    num_drafts: list[int] = field(default_factory=list)  # parallel to `seqs`
    preempted: list[Sequence] = field(default_factory=list)  # hold nothing any more
