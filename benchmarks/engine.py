"""Time of prefill and of a decode step of a slice of the model on one card, beside the least time the card needs.

`baton bench engine --slice L --point BxC [--point BxC …] [--mtp K …] [--routing uniform|trace] [--profile] [--json]`.
The slice has the real model's width, one dense layer and L - 1 with experts; all points run over one set of weights.
TPOT is wall time between the tokens of a sequence on the host, everything included; with drafts it follows from the
step's time and the acceptance that is assumed. With `--through worker` the engine of a decode worker decodes instead,
and the time of its host is told by part.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.engine_floor import Card, decode_bytes, prefill_seconds, target_ms
from benchmarks.engine_profile import busy_time, kernel_times, lines_of
from benchmarks.engine_run import Point, Sequences
from benchmarks.engine_slice import drawn_weights, routed, slice_spec
from benchmarks.engine_worker import DecodingWorker, numbers_of
from llm_engine.models.deepseek_v32 import CausalLM, build_model
from llm_engine.models.spec import ModelSpec
from llm_engine.ops import Ops, load_ops

_TABLE = ("1x1024", "1x65536", "16x8192", "64x4096", "128x2048")  # the points whose targets are known
_PROFILED_STEPS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is the same for every point."""

    acceptance: float = 0.85  # of every draft, given those before it
    fp8: bool = True
    trace: Tensor | None = None  # expert ids [T, K]; None: uniform routing
    profile: bool = False


@torch.inference_mode()
def measure(
    spec: ModelSpec, ops: Ops, points: Sequence[Point], options: Options, card: Card, *, on_worker: bool = False
) -> Iterator[dict[str, Any]]:
    """Prefill and decode at each point, with the floors of `card`; or decode by a worker's engine.

    Weights are drawn once.
    """
    started = time.perf_counter()
    with_mtp = any(point.mtp for point in points)
    max_rows = max(max(point.chunk, point.batch * point.rows_per_seq) for point in points)
    table = routed(ops, spec, max_rows, options.trace)
    weights = drawn_weights(spec, ops, with_mtp=with_mtp)
    model = build_model(spec, weights, table, max(point.longest for point in points))
    common = {
        "table": ops.name,
        "pages": "fp8" if options.fp8 else str(ops.dtype).removeprefix("torch."),
        "layers": spec.num_layers,
        "routing": "uniform" if options.trace is None else "trace",
        "load_s": round(time.perf_counter() - started, 2),
        "weights_gb": _gigabytes(ops, torch.accelerator.memory_allocated),
    }
    for point in points:
        if on_worker:
            yield common | _measure_worker(model, ops, point, options)
        else:
            yield common | _measure_point(model, ops, point, options, card)


def _measure_worker(model: CausalLM, ops: Ops, point: Point, options: Options) -> dict[str, Any]:
    started = time.perf_counter()
    if ops.device.type != "cpu":
        gc.collect()  # the worker of the point before
        torch.accelerator.empty_cache()
    worker = DecodingWorker(model, ops, point, fp8=options.fp8)
    admit_s = time.perf_counter() - started
    times = asyncio.run(worker.run())
    result = {
        "batch": point.batch,
        "context": point.context,
        "mtp": point.mtp,
        "through": "worker",
        "admit_s": round(admit_s, 2),
        **numbers_of(times),
    }
    if options.profile and ops.device.type != "cpu":
        busy_s, span_s = busy_time(lambda: worker.run_steps(_PROFILED_STEPS))
        result["profiled_step_ms"] = round(span_s / _PROFILED_STEPS * 1e3, 3)
        result["profiled_idle"] = round(1 - busy_s / span_s, 4)
        result["decode_kernels"] = kernel_times(lambda: worker.run_steps(_PROFILED_STEPS), _PROFILED_STEPS)
    return result


def _measure_point(model: CausalLM, ops: Ops, point: Point, options: Options, card: Card) -> dict[str, Any]:
    spec, on_card = model.spec, ops.device.type != "cpu"
    if on_card:
        torch.accelerator.empty_cache()
        torch.accelerator.reset_peak_memory_stats()
    sequences = Sequences(model, ops, point, fp8=options.fp8)
    sequences.warm_up()
    prefill_s = sequences.prefill()
    times = sequences.decode()
    accepted = 1 + sum(options.acceptance**draft for draft in range(1, point.mtp + 1))
    read = decode_bytes(spec, point.batch, point.context, point.rows_per_seq)
    floor_s = read / card.bytes_per_s
    prefill_floor_s = prefill_seconds(spec, card, point.batch, point.context)
    wanted_ms = None if point.mtp else target_ms(spec, point.batch, point.context)
    result: dict[str, Any] = {
        "batch": point.batch,
        "context": point.context,
        "mtp": point.mtp,
        "acceptance": options.acceptance if point.mtp else None,
        "prefill_s": round(prefill_s, 4),
        "prefill_chunk": point.chunk,
        "prefill_floor_s": round(prefill_floor_s, 4),
        "prefill_over_floor": round(prefill_s / prefill_floor_s, 3),
        "prefill_tokens_per_s": round(point.batch * point.context / prefill_s),
        "step_ms": round(times.step * 1e3, 3),
        "device_ms": round(times.device * 1e3, 3),
        "host_ms": round(times.host * 1e3, 3),
        "host_overhead": round(max(1 - times.device / times.step, 0), 4),
        "tpot_ms": round(times.step / accepted * 1e3, 3),
        "floor_bytes": round(read),
        "floor_ms": round(floor_s * 1e3, 3),
        "step_over_floor": round(times.step / floor_s, 3),
        "target_ms": wanted_ms,
        "target_over_floor": None if wanted_ms is None else round(wanted_ms / 1e3 / floor_s, 3),
        "caches_gb": round(sequences.caches.num_bytes / 1e9, 2),
        "peak_gb": _gigabytes(ops, torch.accelerator.max_memory_allocated),
    }
    if options.profile and on_card:
        result["decode_kernels"] = _profile_decode(sequences)
        result["prefill_kernels"] = kernel_times(sequences.prefill, 1)
    return result


def _profile_decode(sequences: Sequences) -> list[dict[str, Any]]:
    step = sequences.record()
    step(0)

    def steps() -> None:
        for number in range(_PROFILED_STEPS):
            step(number)

    return kernel_times(steps, _PROFILED_STEPS)


def _gigabytes(ops: Ops, read: Any) -> float | None:
    return None if ops.device.type == "cpu" else round(read() / 1e9, 2)


def _point(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r}: expected sequences x tokens, such as 16x8192")
    return int(found[1]), int(found[2])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="baton bench engine", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--slice", type=int, default=8, metavar="L", help="layers (default %(default)s)")
    parser.add_argument(
        "--point", type=_point, action="append", metavar="BxC", help="sequences x tokens prefilled; may be repeated"
    )
    parser.add_argument("--table", action="store_true", help=f"the points {', '.join(_TABLE)}")
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="one point's sequences (default %(default)s)")
    parser.add_argument("--context", type=int, default=1024, metavar="C", help="and tokens (default %(default)s)")
    parser.add_argument(
        "--mtp", type=int, action="append", choices=range(4), metavar="K", help="drafts a step; may be repeated"
    )
    parser.add_argument("--acceptance", type=float, default=0.85, help="assumed of every draft (default %(default)s)")
    parser.add_argument("--routing", choices=("uniform", "trace"), default="uniform")
    parser.add_argument("--trace", metavar="FILE", help="expert ids [T, K] as .npy, for --routing trace")
    parser.add_argument("--format", choices=("fp8", "bf16"), default="fp8", help="of weights and pages")
    parser.add_argument("--numerics", choices=("fast", "exact"), default="fast")
    parser.add_argument("--steps", type=int, default=32, help="decode steps measured (default %(default)s)")
    parser.add_argument("--chunk", type=int, default=8192, help="rows of a prefill pass (default %(default)s)")
    parser.add_argument("--gb-per-s", type=float, default=4270.0, help="memory rate of the floor (default %(default)s)")
    parser.add_argument(
        "--through",
        choices=("passes", "worker"),
        default="passes",
        help="what launches the steps: this benchmark, or the engine of a decode worker on its step thread",
    )
    parser.add_argument("--profile", action="store_true", help="also the time of every kernel")
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    if (args.routing == "trace") != (args.trace is not None):
        parser.error("--routing trace and --trace FILE go together")
    pairs = [*(args.point or []), *(map(_point, _TABLE) if args.table else [])] or [(args.batch, args.context)]
    points = [
        Point(batch=batch, context=context, mtp=mtp, steps=args.steps, chunk=args.chunk)
        for batch, context in pairs
        for mtp in args.mtp or [0]
    ]
    options = Options(
        acceptance=args.acceptance,
        fp8=args.format == "fp8",
        trace=None if args.trace is None else torch.from_numpy(np.load(args.trace)),
        profile=args.profile,
    )
    ops = load_ops("triton", args.numerics, args.format)
    results = []
    spec, card, on_worker = slice_spec(args.slice), Card(bytes_per_s=args.gb_per_s * 1e9), args.through == "worker"
    for result in measure(spec, ops, points, options, card, on_worker=on_worker):
        results.append(result)
        if not args.json:
            print("\n".join(lines_of(result)), flush=True)
    if args.json:
        print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
