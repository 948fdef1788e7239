"""Sequences that run on a slice of the model: their caches, prefill in passes, decode in recorded passes.

Decode goes as an engine would go: while the device computes a step, the host plans and launches the next one. Positions
are known beforehand, tokens go from step to step on the device, and only what was sampled is read back.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from benchmarks.engine_slice import SliceCaches
from llm_engine.models.deepseek_v32 import CausalLM
from llm_engine.ops import ForwardBatch, Ops, to_device
from llm_engine.runtime.batch import SequenceRows, build_batch
from llm_engine.runtime.graphs import PassGraphs

BLOCK_TOKENS = 64
WARM_UP = 3  # steps that are not counted


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """What is measured: sequences and their length, drafts a step, steps, rows of a prefill pass."""

    batch: int
    context: int
    mtp: int = 0
    steps: int = 32
    chunk: int = 8192

    @property
    def rows_per_seq(self) -> int:
        """Rows of a sequence in a decode step."""
        return 1 + self.mtp

    @property
    def longest(self) -> int:
        """Positions of a sequence, rounded up to whole blocks. Every step advances it by all its rows."""
        length = self.context + (self.steps + WARM_UP) * self.rows_per_seq
        return -(-length // BLOCK_TOKENS) * BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class DecodeTimes:
    """Medians, in seconds: between the tokens of two steps, of the device's part, of the host's."""

    step: float
    device: float
    host: float


class Sequences:
    """The sequences of one point, which own scattered blocks of caches of their own."""

    def __init__(self, model: CausalLM, ops: Ops, point: Point, *, fp8: bool) -> None:
        self.model, self.ops, self.point = model, ops, point
        blocks = point.batch * point.longest // BLOCK_TOKENS
        self.caches = SliceCaches.allocate(model.spec, ops, blocks, BLOCK_TOKENS, fp8=fp8, mtp=point.mtp > 0)
        order = random.Random(0).sample(range(blocks), blocks)
        self._tables = [order[seq :: point.batch] for seq in range(point.batch)]
        self._tokens_SK = torch.zeros(point.batch, point.rows_per_seq, dtype=torch.int64, device=ops.device)

    def warm_up(self) -> None:
        """Compile and allocate what prefill needs: as much of it as differs from pass to pass."""
        self.prefill(num_seqs=-(-2 * self.point.chunk // self.point.context))

    def prefill(self, num_seqs: int | None = None) -> float:
        """Seconds to prefill the sequences, or the first of them, in passes of at most `chunk` rows."""
        waiting = [(seq, 0) for seq in range(self.point.batch)][:num_seqs]
        self._wait()
        started = time.perf_counter()
        while waiting:
            budget, rows = self.point.chunk, []
            while waiting and budget:
                seq, start = waiting.pop(0)
                count = min(self.point.context - start, budget)
                rows.append(self._rows(seq, start, count))
                budget -= count
                if start + count < self.point.context:
                    waiting.insert(0, (seq, start + count))
            batch = build_batch(rows, block_tokens=BLOCK_TOKENS, row_tile=self.ops.row_tile).to(self.ops.device)
            hidden_RH = self.model.forward(batch, self.caches)
            ends = to_device(torch.tensor(batch.row_starts[1:]) - 1, self.ops.device)
            best(self.model.logits(hidden_RH[ends]))
        self._wait()
        return time.perf_counter() - started

    def record(self) -> Callable[[int], Tensor]:
        """A call that launches the decode step with a number and returns its tokens, valid until the next call."""
        point = self.point
        graphs = PassGraphs(
            lambda batch, _: self._forward(batch),
            self.ops,
            rows_per_seq=point.rows_per_seq,
            num_seqs=[point.batch],
            max_contexts=[point.longest],
            block_tokens=BLOCK_TOKENS,
        )
        graphs.prepare()

        def step(number: int) -> Tensor:
            start = point.context + number * point.rows_per_seq
            rows = [self._rows(seq, start, point.rows_per_seq) for seq in range(point.batch)]
            tokens = graphs.run(build_batch(rows, block_tokens=BLOCK_TOKENS, row_tile=self.ops.row_tile))
            assert tokens is not None, "the recording was made for these steps"
            return tokens

        return step

    def decode(self) -> DecodeTimes:
        """Run all steps, one ahead of the tokens that are read back."""
        step = self.record()
        reader, spans = _Reader(self.ops.device), []
        arrivals, busy, count = [], [], self.point.steps + WARM_UP
        spans.append(self._launch(step, 0, reader))
        for number in range(1, count + 1):
            started = time.perf_counter()
            if number < count:
                spans.append(self._launch(step, number, reader))
            waiting = time.perf_counter()
            reader.wait()
            arrived = time.perf_counter()
            reader.receive()
            busy.append(waiting - started + time.perf_counter() - arrived)
            arrivals.append(arrived)
        self._wait()
        between = [after - before for before, after in pairwise(arrivals)]
        return DecodeTimes(
            step=statistics.median(between[WARM_UP - 1 :]),
            device=statistics.median(span() for span in spans[WARM_UP:]),
            host=statistics.median(busy[WARM_UP:]),
        )

    def _launch(self, step: Callable[[int], Tensor], number: int, reader: _Reader) -> Callable[[], float]:
        """Launch a step. Returns how to learn, once it is over, the seconds that the device spent on it."""
        if self.ops.device.type == "cpu":
            started = time.perf_counter()
            reader.send(step(number))
            spent = time.perf_counter() - started
            return lambda: spent
        begin, end = (torch.Event(self.ops.device, enable_timing=True) for _ in range(2))
        begin.record()
        reader.send(step(number))
        end.record()
        return lambda: begin.elapsed_time(end) / 1e3

    def _rows(self, seq: int, start: int, count: int) -> SequenceRows:
        """Some tokens of a sequence at positions from `start` on."""
        tokens = range(seq + start, seq + start + count)
        if tokens.stop > self.model.spec.vocab_size:
            tokens = range(count)
        return SequenceRows(tokens, start, self._tables[seq])

    def _forward(self, batch: ForwardBatch) -> Tensor:
        """The tokens that follow each row. The next step starts from the last ones and what is drafted after them."""
        batch = replace(batch, token_ids_R=self._tokens_SK.flatten())
        hidden_RH = self.model.forward(batch, self.caches)
        tokens_R = best(self.model.logits(hidden_RH))
        drafts = self._drafts(batch, hidden_RH)
        last_S = tokens_R.view(self.point.batch, -1)[:, -1]
        self._tokens_SK.copy_(torch.stack([last_S, *drafts], 1))
        return tokens_R

    def _drafts(self, batch: ForwardBatch, hidden_RH: Tensor) -> list[Tensor]:
        """One pass over all verified rows, then single rows; these keep their positions, which costs the same."""
        drafted: list[Tensor] = []
        mtp = self.point.mtp
        last = torch.arange(batch.num_seqs, device=self.ops.device) * (1 + mtp) + mtp
        for _ in range(mtp):
            hidden_RH = self.model.mtp(batch, hidden_RH, self.caches)
            if not drafted:
                hidden_RH = hidden_RH[last]
                batch = _only(batch, last)
            drafted.append(best(self.model.draft_logits(hidden_RH)))
        return drafted

    def _wait(self) -> None:
        if self.ops.device.type != "cpu":
            torch.accelerator.synchronize()


class _Reader:
    """Brings the tokens of steps to the host in order, through two buffers in turn."""

    def __init__(self, device: torch.device) -> None:
        self._on_card = device.type != "cpu"
        self._free: list[Tensor] = []
        self._sent: list[tuple[Tensor, torch.Event | None]] = []

    def send(self, tokens: Tensor) -> None:
        """Begin to copy the tokens of a step."""
        buffer = self._free.pop() if self._free else torch.empty_like(tokens, device="cpu", pin_memory=self._on_card)
        buffer.copy_(tokens, non_blocking=True)
        event = None
        if self._on_card:
            event = torch.Event(tokens.device)
            event.record()
        self._sent.append((buffer, event))

    def wait(self) -> None:
        """Until the tokens of the oldest step are there."""
        event = self._sent[0][1]
        if event is not None:
            event.synchronize()

    def receive(self) -> list[int]:
        """The tokens of the oldest step."""
        buffer, _ = self._sent.pop(0)
        self._free.append(buffer)
        tokens: list[int] = buffer.tolist()
        return tokens


def best(logits_RV: Tensor) -> Tensor:
    """The most likely token of each row. In parts, which occupy a card even for one row."""
    vocab = logits_RV.shape[1]
    parts = next(count for count in range(64, 0, -1) if vocab % count == 0)
    high_RP, at_RP = logits_RV.view(-1, parts, vocab // parts).max(-1)
    part_R1 = high_RP.argmax(-1, keepdim=True)
    return torch.add(at_RP.gather(1, part_R1), part_R1, alpha=vocab // parts).squeeze(1)


def _only(batch: ForwardBatch, rows: Tensor) -> ForwardBatch:
    """A batch of one row a sequence: those given. Nothing of it waits for the device."""
    return ForwardBatch(
        token_ids_R=batch.token_ids_R[rows],
        positions_R=batch.positions_R[rows],
        slots_N=batch.slots_N[rows],
        block_tables_SB=batch.block_tables_SB,
        row_starts=tuple(range(batch.num_seqs + 1)),
        context_lens=batch.context_lens,
    )
