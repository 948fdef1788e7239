"""A pass from its launch until its results are committed."""

from __future__ import annotations

from dataclasses import dataclass

from llm_engine.ops import ForwardBatch
from llm_engine.runtime.layer_feed import Span
from llm_engine.runtime.outlook import Outlook
from llm_engine.runtime.runner import Launched, Passed, StepOutput
from llm_engine.sched.plan import Chunk
from llm_engine.sched.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Flight:
    """A pass that is under way."""

    seqs: list[Sequence]  # that decode
    chunks: list[Chunk]
    spans: list[Span]  # blocks that the chunks complete, if a sink is told of them
    launched: Launched
    started: float  # engine clock
    outlook: Outlook | None  # None: the next pass starts from what is committed


@dataclass(frozen=True, slots=True)
class Landed:
    """A pass that has ended."""

    flight: Flight
    out: StepOutput
    ended: float  # engine clock


@dataclass(frozen=True, slots=True)
class Early:
    """The first pass of a step, launched before the step was planned."""

    seqs: list[Sequence]
    started: float  # engine clock
    main: tuple[ForwardBatch, Passed] | None = None  # of the main model, if it is that; None: the draft layer has it
