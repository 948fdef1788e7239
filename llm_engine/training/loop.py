"""The training loop: one optimiser step per batch, checkpoints to go on from, scores on the way."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from llm_engine.training.feed import Batch, Feed
from llm_engine.training.model import NanoModel
from llm_engine.training.optim import Optimizer
from llm_engine.training.render import Document
from llm_engine.training.schedule import Schedule
from llm_engine.training.scoring import exact_match

_BALANCE_RATE: Final = 1e-3
_SAMPLED: Final = 64  # positions of every row at which the indexer learns
_LOG_EVERY: Final = 25


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """`seconds`: stop and save after so long; `processes` make batches; scores every `score_every` steps."""

    seconds: float
    processes: int
    score_every: int
    seed: int = 0


class Trainer:
    """A model, its optimiser and how far it has come."""

    def __init__(self, model: NanoModel, tokenizer: Tokenizer, schedule: Schedule, log: Path) -> None:
        self.model, self._tokenizer, self._schedule, self._log = model, tokenizer, schedule, log
        self._device = model.cos.device
        self._optimizer = Optimizer(model)
        self.step = 0

    def run(self, limits: Limits, tests: Mapping[str, Sequence[Document]]) -> bool:
        """Train until the schedule ends (True) or time is up (False)."""
        schedule = self._schedule
        shapes = [schedule.shape(step) for step in range(schedule.steps)]
        started = last = time.monotonic()
        tokens = 0
        feed = Feed(self._tokenizer, shapes, seed=limits.seed, first=self.step, processes=limits.processes)
        with feed:
            for batch in feed:
                report = self._train_step(batch)
                tokens += batch.ids.size
                self.step += 1
                if self.step % _LOG_EVERY == 0 or self.step == schedule.steps:
                    facts = {name: round(float(value), 4) for name, value in report.items()}
                    now = time.monotonic()
                    self._write({"step": self.step, **facts, "tokens_per_s": round(tokens / (now - last))})
                    last, tokens = now, 0
                if self.step % limits.score_every == 0 or self.step == schedule.steps:
                    sparse = schedule.is_sparse(self.step)
                    with self._autocast():
                        self._write(
                            {"step": self.step, "sparse": sparse} | exact_match(self.model, tests, sparse=sparse)
                        )
                    last, tokens = time.monotonic(), 0
                if time.monotonic() - started > limits.seconds:
                    break
        return self.step >= schedule.steps

    def save(self, path: Path) -> None:
        """Write everything needed to go on."""
        part = path.with_suffix(".part")
        torch.save({"step": self.step, "model": self.model.state_dict(), "optimizer": self._optimizer.state()}, part)
        part.replace(path)

    def load(self, path: Path) -> None:
        """Go on from a saved state."""
        state = torch.load(path, map_location=self._device, weights_only=True)
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self._optimizer.load(state["optimizer"])

    def _train_step(self, batch: Batch) -> dict[str, Tensor | float]:
        schedule, step = self._schedule, self.step
        ids = self._moved(batch.ids).long()
        weights, segments = self._moved(batch.weights).float(), self._moved(batch.segments)
        generator = torch.Generator().manual_seed(step)
        sampled = torch.randperm(ids.shape[1], generator=generator)[:_SAMPLED].to(self._device)
        with self._autocast():
            logits, drafts, index_loss = self.model(ids, segments, sparse=schedule.is_sparse(step), sampled=sampled)
        loss = _cross_entropy(logits[:, :-1], ids[:, 1:], weights[:, 1:])
        kept = weights[:, 2:] * (segments[:, 2:] == segments[:, :-2])
        draft_loss = _cross_entropy(drafts[:, :-2], ids[:, 2:], kept)
        (loss + schedule.mtp_weight(step) * draft_loss + index_loss).backward()
        rate = schedule.rate(step)
        self._optimizer.step(rate)
        crowded = torch.stack([gate.balance(_BALANCE_RATE) for gate in self.model.gates()]).max()
        losses = {"loss": loss, "draft_loss": draft_loss, "index_loss": index_loss}
        return {name: value.detach() for name, value in losses.items()} | {"crowded": crowded, "rate": rate}

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._device.type == "cuda")

    def _moved(self, array: Any) -> Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)

    def _write(self, facts: Mapping[str, Any]) -> None:
        line = json.dumps(facts)
        print(line, flush=True)
        with self._log.open("a", encoding="utf-8") as log:
            log.write(line + "\n")


def _cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Mean over the targets, weighted."""
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum().clamp_min(1.0)
