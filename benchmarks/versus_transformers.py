"""Baton against transformers `generate` on one checkpoint, in one run: `python -m benchmarks.versus_transformers`.

transformers runs one static batch of greedy requests with all cores to itself; Baton serves the same requests over
HTTP through its router, a prefill worker and a decode worker (or one aggregated worker), each of them a process on the
same cores.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.loadgen import Job
from benchmarks.machine import machine
from benchmarks.versus import baton, closed_loop, make_jobs


def measure_transformers(model_dir: Path, jobs: Sequence[Job], dtype: str, threads: int) -> float:
    """Output tokens per second of `generate` on the jobs as one batch; the best of two runs after a short warm-up."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    torch_dtype = torch.float32 if dtype == "fp32" else torch.bfloat16
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch_dtype)
    model.eval()
    ids = torch.tensor([job.prompt for job in jobs])
    length = jobs[0].max_tokens

    def run(new_tokens: int) -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                pad_token_id=2,
            )
        assert torch.as_tensor(out).shape[1] == ids.shape[1] + new_tokens
        return time.perf_counter() - start

    run(4)
    return float(len(jobs) * length / min(run(length), run(length)))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 1 when the ratio misses --at-least."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.versus_transformers", description=__doc__)
    parser.add_argument("--model", type=Path, help="checkpoint (default: `tiny` with planted weights, made on the fly)")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--numerics", choices=("exact", "fast"), default="exact")
    parser.add_argument("--drafts", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="threads of each Baton worker")
    parser.add_argument("--aggregated", action="store_true")
    parser.add_argument("--at-least", type=float, default=0.0, help="exit with 1 below this ratio")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="baton-model-") as scratch:
        report = compare(args, args.model or _tiny(Path(scratch)))
    print(json.dumps(report, indent=None if args.json else 2))
    return 0 if report["ratio"] >= args.at_least else 1


def compare(args: argparse.Namespace, model_dir: Path) -> dict[str, Any]:
    """Both measurements and their ratio."""
    jobs = make_jobs(args.streams, args.input_len, args.output_len, seed=1)
    settings = {
        "model.path": str(model_dir),
        "engine.dtype": args.dtype,
        "engine.numerics": args.numerics,
        "engine.num_drafts": args.drafts,
        "engine.threads": args.threads,
        "kv.prefix_cache": False,
    }
    with baton(settings, jobs[:4], aggregated=args.aggregated) as url:
        ours = closed_loop(url, jobs, args.streams)
    peer = measure_transformers(model_dir, jobs, args.dtype, os.cpu_count() or 1)
    return {
        "machine": machine(),
        "settings": {key: value for key, value in settings.items() if key != "model.path"},
        "aggregated": args.aggregated,
        "baton": ours,
        "transformers_tokens_per_s": round(peer, 1),
        "ratio": round(ours["output_tokens_per_s"] / peer, 2),
    }


def _tiny(directory: Path) -> Path:
    from llm_engine.models.synthetic import make_checkpoint

    make_checkpoint("tiny", directory / "tiny", planted=True)
    return directory / "tiny"


if __name__ == "__main__":
    raise SystemExit(main())
