"""Train Baton-nano: `python -m llm_engine.training --out DIR`. Run again, it goes on where it stopped."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer

from llm_engine.models.spec import ModelSpec
from llm_engine.training.architecture import CONFIG, VOCAB_SIZE
from llm_engine.training.export import export_model
from llm_engine.training.loop import Limits, Trainer
from llm_engine.training.model import NanoModel
from llm_engine.training.schedule import LENGTHS, PEAK_RATE, Schedule
from llm_engine.training.scoring import held_out
from llm_engine.training.tokenizer import train_tokenizer


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 when training is complete and 3 when it stopped at its time limit."""
    parser = argparse.ArgumentParser(prog="python -m llm_engine.training", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory of state, log and checkpoint")
    parser.add_argument("--steps", type=int, default=8600, help="optimiser steps of the whole run")
    parser.add_argument("--tokens", type=int, default=1 << 16, help="tokens of a step")
    parser.add_argument("--rate", type=float, default=PEAK_RATE, help="peak learning rate")
    parser.add_argument(
        "--lengths", type=int, nargs=3, default=LENGTHS, help="tokens of a short, a medium and a long row"
    )
    parser.add_argument("--minutes", type=float, default=600.0, help="stop after so long, to be continued")
    parser.add_argument("--score-every", type=int, default=1000, help="steps between scores")
    parser.add_argument("--score-samples", type=int, default=64, help="held-out samples of a skill")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="that make batches")
    parser.add_argument("--tokenizer", type=Path, help="use this tokenizer.json instead of training one")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(args.tokenizer)) if args.tokenizer else train_tokenizer(VOCAB_SIZE, args.seed)
    model = NanoModel(ModelSpec.from_config(CONFIG)).to(args.device)
    schedule = Schedule(steps=args.steps, tokens=args.tokens, peak_rate=args.rate, lengths=tuple(args.lengths))
    trainer = Trainer(model, tokenizer, schedule, args.out / "log.jsonl")
    state = args.out / "state.pt"
    if state.exists():
        trainer.load(state)
    limits = Limits(seconds=60 * args.minutes, processes=args.processes, score_every=args.score_every, seed=args.seed)
    done = trainer.run(limits, held_out(tokenizer, args.score_samples, schedule.lengths[-1]))
    trainer.save(state)
    print(export_model(model, tokenizer, args.out / "baton-nano"))
    return 0 if done else 3


if __name__ == "__main__":
    raise SystemExit(main())
