"""Tells a sink which blocks of which layer are final, while the step that computes them is running."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from llm_engine.sched.plan import Chunk
from llm_engine.sched.sequence import Sequence
from llm_engine.sched.step import LayerSink


@dataclass(frozen=True, slots=True)
class Span:
    """Adjacent blocks of one sequence, the first of which is its block number `first`."""

    seq: Sequence
    first: int
    blocks: list[int]


class LayerFeed:
    """Reports every (layer, block) of a sequence once. Layer `num_layers` is the MTP layer, if there is one."""

    def __init__(self, sink: LayerSink, *, num_layers: int, with_mtp: bool, block_tokens: int) -> None:
        self._sink = sink
        self._num_layers = num_layers
        self._with_mtp = with_mtp
        self._block_tokens = block_tokens

    def start(self, seq: Sequence) -> None:
        """A sequence is about to be computed: announce it and the blocks it found in the prefix cache."""
        self._sink.started(seq)
        hits = seq.blocks[: seq.num_cached // self._block_tokens]
        if hits:
            self._sink.layers_ready(seq, range(self._num_layers + self._with_mtp), 0, hits)

    def spans(self, chunks: Seq[Chunk]) -> list[Span]:
        """The blocks that these chunks complete."""
        spans = []
        for chunk in chunks:
            first = chunk.start // self._block_tokens
            end = len(chunk.seq.blocks) if chunk.is_last else chunk.end // self._block_tokens
            if end > first:
                spans.append(Span(chunk.seq, first, chunk.seq.blocks[first:end]))
        return spans

    def on_layer(self, spans: Seq[Span]) -> Callable[[int], None]:
        """The callback of a forward pass over the chunks of `spans`."""

        def report(layer: int) -> None:
            for span in spans:
                self._sink.layers_ready(span.seq, range(layer, layer + 1), span.first, span.blocks)

        return report

    def mtp_done(self, spans: Seq[Span]) -> None:
        """The MTP layer has caught up with `spans`."""
        self.on_layer(spans)(self._num_layers)
