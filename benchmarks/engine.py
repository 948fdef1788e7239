"""Time of prefill and of a decode step of a slice of the model on one card, beside the least time the card needs.

`baton bench engine --slice L --batch B --context C [--mtp K] [--routing uniform|trace] [--json]`. The slice has the
real model's width, one dense layer and L - 1 with experts. TPOT is wall time between the tokens of a sequence on the
host, everything included; with drafts it follows from the step's time and the acceptance that is assumed.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.engine_floor import Card, decode_bytes, prefill_seconds
from benchmarks.engine_slice import SliceCaches, drawn_weights, routed, slice_spec
from llm_engine.models.deepseek_v32 import CausalLM, build_model
from llm_engine.models.spec import ModelSpec
from llm_engine.ops import ForwardBatch, Ops, load_ops
from llm_engine.runtime.batch import SequenceRows, build_batch
from llm_engine.runtime.graphs import DecodeGraphs

BLOCK_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is measured."""

    batch: int
    context: int
    mtp: int = 0
    acceptance: float = 0.85  # of every draft, given those before it
    steps: int = 32
    chunk: int = 8192  # rows of a prefill pass
    fp8: bool = True
    trace: Tensor | None = None  # expert ids [T, K]; None: uniform routing


class Slice:
    """A model with caches, and sequences that own scattered blocks of them."""

    def __init__(self, spec: ModelSpec, ops: Ops, options: Options) -> None:
        self.ops, self.options = ops, options
        # Every step advances a sequence by all its rows; the graph's bound covers the warm-up too.
        longest = options.context + (options.steps + 2) * (1 + options.mtp)
        per_seq = -(-longest // BLOCK_TOKENS)
        self.bound = per_seq * BLOCK_TOKENS
        max_rows = max(options.chunk, options.batch * (1 + options.mtp))
        table = routed(ops, spec, max_rows, options.trace)
        with_mtp = options.mtp > 0
        weights = drawn_weights(spec, ops, with_mtp=with_mtp)
        self.model: CausalLM = build_model(spec, weights, table, self.bound)
        blocks = options.batch * per_seq
        self.caches = SliceCaches.allocate(spec, ops, blocks, BLOCK_TOKENS, fp8=options.fp8, mtp=with_mtp)
        order = random.Random(0).sample(range(blocks), blocks)
        self.tables = [order[seq :: options.batch] for seq in range(options.batch)]
        self._vocab = spec.vocab_size

    def rows(self, seq: int, start: int, count: int) -> SequenceRows:
        """Some tokens of a sequence at positions from `start` on."""
        return SequenceRows([(seq + start + i) % self._vocab for i in range(count)], start, self.tables[seq])

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Next tokens of all rows and, with drafts, the drafted ones: [R + S · K]."""
        hidden_RH = self.model.forward(batch, self.caches)
        tokens_R = self.model.logits(hidden_RH).argmax(-1)
        return torch.cat([tokens_R, *self._drafts(batch, hidden_RH)])

    def _drafts(self, batch: ForwardBatch, hidden_RH: Tensor) -> list[Tensor]:
        """One pass over all verified rows, then single rows; these keep their positions, which costs the same."""
        drafted: list[Tensor] = []
        last = torch.arange(batch.num_seqs, device=self.ops.device) * (1 + self.options.mtp) + self.options.mtp
        for _ in range(self.options.mtp):
            hidden_RH = self.model.mtp(batch, hidden_RH, self.caches)
            if not drafted:
                hidden_RH = hidden_RH[last]
                batch = _only(batch, last)
            drafted.append(self.model.draft_logits(hidden_RH).argmax(-1))
        return drafted

    def prefill(self) -> float:
        """Seconds to prefill every sequence, in passes of at most `chunk` rows."""
        waiting = [(seq, 0) for seq in range(self.options.batch)]
        self._wait()
        started = time.perf_counter()
        while waiting:
            budget, rows = self.options.chunk, []
            while waiting and budget:
                seq, start = waiting.pop(0)
                count = min(self.options.context - start, budget)
                rows.append(self.rows(seq, start, count))
                budget -= count
                if start + count < self.options.context:
                    waiting.insert(0, (seq, start + count))
            batch = build_batch(rows, block_tokens=BLOCK_TOKENS, row_tile=self.ops.row_tile).to(self.ops.device)
            hidden_RH = self.model.forward(batch, self.caches)
            ends = torch.tensor(batch.row_starts[1:], device=self.ops.device) - 1
            self.model.logits(hidden_RH[ends]).argmax(-1)
        self._wait()
        return time.perf_counter() - started

    def decode(self) -> tuple[list[float], float]:
        """Seconds of each step, tokens read back; and of a step when the host only launches."""
        rows_per_seq = 1 + self.options.mtp
        graphs = DecodeGraphs(
            self.forward,
            self.ops,
            rows_per_seq=rows_per_seq,
            num_seqs=[self.options.batch],
            max_contexts=[self.bound],
            block_tokens=BLOCK_TOKENS,
        )
        graphs.prepare()
        times = []
        for step in range(self.options.steps):
            started = time.perf_counter()
            self._step(graphs, self.options.context + step * rows_per_seq).tolist()
            times.append(time.perf_counter() - started)
        started = time.perf_counter()
        for _ in range(self.options.steps):
            self._step(graphs, self.options.context)
        self._wait()
        return times, (time.perf_counter() - started) / self.options.steps

    def _step(self, graphs: DecodeGraphs, start: int) -> Tensor:
        rows = [self.rows(seq, start, 1 + self.options.mtp) for seq in range(self.options.batch)]
        tokens = graphs.run(build_batch(rows, block_tokens=BLOCK_TOKENS, row_tile=self.ops.row_tile))
        assert tokens is not None, "the recording was made for these steps"
        return tokens

    def _wait(self) -> None:
        if self.ops.device.type != "cpu":
            torch.accelerator.synchronize()


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


@torch.inference_mode()
def measure(spec: ModelSpec, ops: Ops, options: Options, card: Card) -> dict[str, Any]:
    """Prefill and decode, with the floors of `card`."""
    built = time.perf_counter()
    model = Slice(spec, ops, options)
    load_s = time.perf_counter() - built
    model.prefill()  # compiles and allocates
    prefill_s = model.prefill()
    times, launch_s = model.decode()
    step_s = statistics.median(times)
    accepted = 1 + sum(options.acceptance**draft for draft in range(1, options.mtp + 1))
    read = decode_bytes(spec, options.batch, options.context, 1 + options.mtp)
    floor_s, prefill_floor_s = read / card.bytes_per_s, prefill_seconds(spec, card, options.batch, options.context)
    on_device = ops.device.type != "cpu"
    return {
        "table": ops.name,
        "pages": "fp8" if options.fp8 else str(ops.dtype).removeprefix("torch."),
        "layers": spec.num_layers,
        "batch": options.batch,
        "context": options.context,
        "mtp": options.mtp,
        "acceptance": options.acceptance if options.mtp else None,
        "routing": "uniform" if options.trace is None else "trace",
        "load_s": round(load_s, 2),
        "prefill_s": round(prefill_s, 4),
        "prefill_floor_s": round(prefill_floor_s, 4),
        "prefill_tokens_per_s": round(options.batch * options.context / prefill_s),
        "step_ms": round(step_s * 1e3, 3),
        "launch_only_ms": round(launch_s * 1e3, 3),
        "tpot_ms": round(step_s / accepted * 1e3, 3),
        "floor_bytes": round(read),
        "floor_ms": round(floor_s * 1e3, 3),
        "step_over_floor": round(step_s / floor_s, 3),
        "memory_gb": round(torch.accelerator.max_memory_allocated() / 1e9, 2) if on_device else None,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(prog="baton bench engine", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--slice", type=int, default=8, metavar="L", help="layers (default %(default)s)")
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="sequences (default %(default)s)")
    parser.add_argument("--context", type=int, default=1024, metavar="C", help="tokens prefilled (default %(default)s)")
    parser.add_argument("--mtp", type=int, default=0, choices=range(4), metavar="K", help="drafts a step")
    parser.add_argument("--acceptance", type=float, default=0.85, help="assumed of every draft (default %(default)s)")
    parser.add_argument("--routing", choices=("uniform", "trace"), default="uniform")
    parser.add_argument("--trace", metavar="FILE", help="expert ids [T, K] as .npy, for --routing trace")
    parser.add_argument("--format", choices=("fp8", "bf16"), default="fp8", help="of weights and pages")
    parser.add_argument("--numerics", choices=("fast", "exact"), default="fast")
    parser.add_argument("--steps", type=int, default=32, help="decode steps measured (default %(default)s)")
    parser.add_argument("--chunk", type=int, default=8192, help="rows of a prefill pass (default %(default)s)")
    parser.add_argument("--gb-per-s", type=float, default=4270.0, help="memory rate of the floor (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    if (args.routing == "trace") != (args.trace is not None):
        parser.error("--routing trace and --trace FILE go together")
    options = Options(
        batch=args.batch,
        context=args.context,
        mtp=args.mtp,
        acceptance=args.acceptance,
        steps=args.steps,
        chunk=args.chunk,
        fp8=args.format == "fp8",
        trace=None if args.trace is None else torch.from_numpy(np.load(args.trace)),
    )
    ops = load_ops("triton", args.numerics, args.format)
    result = measure(slice_spec(args.slice), ops, options, Card(bytes_per_s=args.gb_per_s * 1e9))
    print(json.dumps(result) if args.json else "\n".join(f"{name:22}{value}" for name, value in result.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
