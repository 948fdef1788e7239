"""Batches of packed samples, made by processes beside the training loop and equal for equal seeds.

The batch of step n is made by process n modulo their number, from a generator seeded by n: resuming needs no state.
"""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from queue import Empty
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from llm_engine.training.render import Document, document, text_document
from llm_engine.training.samples import draw
from llm_engine.training.skills import MIXTURE, TEXT_SHARE, retrieval_of
from llm_engine.training.tokenizer import python_texts

PAD_ID: Final = 2
_DEPTH: Final = 2  # batches a process prepares ahead
_CARRY: Final = 24  # documents that wait for a row with room
_WAIT_S: Final = 120.0


@dataclass(frozen=True, slots=True)
class Shape:
    """A batch: `rows` rows of `length` tokens; retrieval texts of up to `text` tokens."""

    rows: int
    length: int
    text: int


@dataclass(frozen=True, slots=True)
class Batch:
    """`ids` [B, S], the loss weight of each token, and the number of its document in the row (padding included)."""

    ids: npt.NDArray[np.int16]
    weights: npt.NDArray[np.float16]
    segments: npt.NDArray[np.int16]


class Feed:
    """A context manager that yields the batches of `shapes[first:]` in order."""

    def __init__(self, tokenizer: Tokenizer, shapes: Sequence[Shape], *, seed: int, first: int, processes: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._steps = range(first, len(shapes))
        self._queues = [context.Queue(_DEPTH) for _ in range(processes)]
        self._processes = [
            context.Process(
                target=_produce, args=(tokenizer.to_str(), shapes, seed, first, i, processes, queue), daemon=True
            )
            for i, queue in enumerate(self._queues)
        ]

    def __enter__(self) -> Self:
        for process in self._processes:
            process.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()

    def __iter__(self) -> Iterator[Batch]:
        for step in self._steps:
            queue = self._queues[step % len(self._queues)]
            try:
                yield Batch(*queue.get(timeout=_WAIT_S))
            except Empty:
                raise RuntimeError(f"no batch for step {step} within {_WAIT_S:g} s: did its process die?") from None


def pack(tokenizer: Tokenizer, shape: Shape, seed: str, texts: Sequence[str]) -> Batch:
    """One batch. Rows are filled with whole documents; what is left of a row is padding."""
    documents = _documents(tokenizer, shape, random.Random(seed), texts)
    ids = np.full((shape.rows, shape.length), PAD_ID, np.int16)
    weights = np.zeros((shape.rows, shape.length), np.float16)
    segments = np.zeros((shape.rows, shape.length), np.int16)
    waiting: list[Document] = []
    for row in range(shape.rows):
        used, number = 0, 0
        while True:
            room = shape.length - used
            chosen = next((i for i, waits in enumerate(waiting) if len(waits.ids) <= room), None)
            if chosen is None and len(waiting) >= _CARRY:
                break
            if chosen is None:
                waiting.append(next(documents))
                continue
            found = waiting.pop(chosen)
            number += 1
            here = slice(used, used + len(found.ids))
            ids[row, here], weights[row, here], segments[row, here] = found.ids, found.weights, number
            used += len(found.ids)
            if used == shape.length:
                break
    return Batch(ids, weights, segments)


def _documents(tokenizer: Tokenizer, shape: Shape, rng: random.Random, texts: Sequence[str]) -> Iterator[Document]:
    """Documents that fit into a row, each skill at its share of the tokens so far."""
    skills = [retrieval_of(shape.text) if share.name == "retrieval" else share.draw for share in MIXTURE]
    wanted = [share.tokens for share in MIXTURE]
    made = [rng.random() * shape.length * wish for wish in (*wanted, TEXT_SHARE)]
    while True:
        behind = min(range(len(made)), key=lambda i: made[i] / (*wanted, TEXT_SHARE)[i])
        if behind == len(skills):
            text = rng.choice(texts)
            start = rng.randrange(max(1, len(text) - shape.length))
            found = text_document(text[start : start + shape.length], tokenizer)
        else:
            found = document(draw(skills[behind], rng), tokenizer)
        made[behind] += len(found.ids)
        if len(found.ids) <= shape.length:
            yield found


def _produce(tree: str, shapes: Sequence[Shape], seed: int, first: int, own: int, processes: int, queue: Any) -> None:
    tokenizer = Tokenizer.from_str(tree)
    texts = python_texts()
    for step in range(first, len(shapes)):
        if step % processes == own:
            batch = pack(tokenizer, shapes[step], f"{seed}/{step}", texts)
            queue.put((batch.ids, batch.weights, batch.segments))
