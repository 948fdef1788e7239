"""Recorded passes of decode. On the CPU the recording is the function itself; the padding and the bounds are real."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from llm_engine.ops import ForwardBatch, Ops, load_ops
from llm_engine.ops_triton.lang import INTERPRETED
from llm_engine.runtime.batch import SequenceRows, States, build_batch
from llm_engine.runtime.graphs import PassGraphs
from tests.models.harness import Harness, random_tokens

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="the harness keeps its tensors on the CPU")


def graphs(harness: Harness, shapes: list[tuple[int, int]]) -> PassGraphs[Tensor]:
    """Over two rows a sequence; `shapes` notes what is recorded: (sequences, context bound)."""

    def forward(batch: ForwardBatch, _: Tensor | None) -> Tensor:
        shapes.append((batch.num_seqs, max(batch.context_lens)))
        return harness.model.forward(batch, harness.store)

    ladder = {"num_seqs": [1, 4], "max_contexts": [12, 48]}
    return PassGraphs(forward, harness.ops, rows_per_seq=2, block_tokens=harness.store.block_tokens, **ladder)


@pytest.mark.slow
def test_a_padded_recording_equals_the_plain_pass(nano_dir: Path, exact: Ops) -> None:
    """Three sequences on the place of four, under a bound that makes short rows select from everything they see."""
    harness = Harness.load(nano_dir, exact, num_seqs=3, max_len=48)
    tokens = [random_tokens(harness.model.spec, length, seed=length) for length in (18, 3, 4)]
    harness.run([(seq, 0, ids[:-2]) for seq, ids in enumerate(tokens)])
    before = harness.store.arena.clone()
    batch = harness.batch([(seq, len(ids) - 2, ids[-2:]) for seq, ids in enumerate(tokens)])
    plain, arena = harness.model.forward(batch, harness.store), harness.store.arena.clone()
    harness.store.arena.copy_(before)
    shapes: list[tuple[int, int]] = []
    recorded = graphs(harness, shapes).run(batch)
    assert recorded is not None
    assert torch.equal(recorded, plain)
    assert torch.equal(harness.store.arena, arena), "padding rows write nothing"
    assert shapes == [(4, 48)]


def test_the_smallest_recording_that_holds_a_batch_is_chosen(nano_dir: Path, exact: Ops) -> None:
    harness = Harness.load(nano_dir, exact, num_seqs=5, max_len=64)
    shapes: list[tuple[int, int]] = []
    ladder = graphs(harness, shapes)
    assert ladder.run(harness.batch([(0, 0, [3, 4])])) is not None
    assert ladder.run(harness.batch([(0, 2, [5, 6])])) is not None
    assert shapes == [(1, 12), (1, 12)]
    for unfit in (
        [(seq, 0, [3, 4]) for seq in range(5)],  # too many sequences
        [(0, 47, [3, 4])],  # too long a context
        [(0, 4, [3, 4, 5])],  # too many rows
        [(0, 4, [3, 4]), (1, 0, [3, 4, 5])],
    ):
        assert ladder.run(harness.batch(unfit)) is None
    assert len(shapes) == 2


def test_sequences_with_fewer_rows_leave_places_empty(nano_dir: Path, exact: Ops) -> None:
    """As when drafts end at the longest length. States that go in stand beside their rows."""
    harness = Harness.load(nano_dir, exact, num_seqs=3, max_len=48)
    rows = [(0, 0, [3, 4, 5]), (1, 0, [6]), (2, 0, [7, 8])]
    batch = harness.batch(rows)
    states = torch.randn(batch.num_rows, harness.model.spec.hidden_size)
    plain = harness.model.mtp(batch, states, harness.store)
    arena = harness.store.arena.clone()

    def draft(batch: ForwardBatch, state_RH: Tensor | None) -> tuple[Tensor, Tensor]:
        assert state_RH is not None
        return harness.model.mtp(batch, state_RH, harness.store), batch.positions_R

    ladder = PassGraphs(
        draft, exact, rows_per_seq=3, num_seqs=[4], max_contexts=[16], block_tokens=16,
        state_width=harness.model.spec.hidden_size,
    )  # fmt: skip
    harness.store.arena.zero_()
    recorded = ladder.run(batch, States(states, np.arange(len(states))))
    assert recorded is not None
    assert torch.equal(recorded[0], plain)
    assert recorded[1].tolist() == [0, 1, 2, 0, 0, 1]
    written = harness.store.arena != 0
    assert torch.equal(harness.store.arena[written], arena[written])


def test_tokens_that_only_the_device_knows_fill_every_row_that_stands_for_them(nano_dir: Path, exact: Ops) -> None:
    """Padding too: it repeats rows, so that it wakes no further expert. Replays take new ones."""
    harness = Harness.load(nano_dir, exact, num_seqs=3, max_len=48)
    seen: list[list[int]] = []

    def forward(batch: ForwardBatch, _: Tensor | None) -> Tensor:
        seen.append(batch.token_ids_R.tolist())
        return batch.token_ids_R * 1

    ladder = PassGraphs(
        forward, exact, rows_per_seq=3, num_seqs=[4], max_contexts=[16], block_tokens=16, takes_late=True
    )
    batch = harness.batch([(0, 0, [3, -2, -1]), (1, 0, [6, -3])])
    for late in ([70, 80, 90], [71, 81, 91]):
        drawn = ladder.run(batch, None, torch.tensor(late))
        assert drawn is not None
        a, b, c = late
        assert drawn.tolist() == [3, b, a, 6, c]
        assert seen[-1] == [3, b, a, *[6, c, c] * 3]


def test_late_tokens_may_be_those_of_more_sequences_than_go_on(exact: Ops) -> None:
    """The first drafts of four sequences, of which the last one wants a second."""
    ladder = PassGraphs(
        lambda batch, _: batch.token_ids_R, exact, rows_per_seq=1, num_seqs=[1, 4], max_contexts=[16],
        block_tokens=16, takes_late=True,
    )  # fmt: skip
    batch = build_batch([SequenceRows([-4], 0, [0])], block_tokens=16, row_tile=1)
    drawn = ladder.run(batch, None, torch.tensor([70, 80, 90, 100]))
    assert drawn is not None
    assert drawn.tolist() == [100]


def test_results_of_last_rows_are_those_of_the_sequences(exact: Ops) -> None:
    """Rows that repeat the last one stand at its end, so the last place of each sequence is the last row's."""
    ladder = PassGraphs(
        lambda batch, _: batch.token_ids_R[2::3], exact, rows_per_seq=3, num_seqs=[4], max_contexts=[16],
        block_tokens=16, of_last=True,
    )  # fmt: skip
    rows = [SequenceRows(ids, 0, [i]) for i, ids in enumerate(([3, 4, 5], [6], [7, 8]))]
    last = ladder.run(build_batch(rows, block_tokens=16, row_tile=1))
    assert last is not None
    assert last.tolist() == [5, 6, 8]


def test_impossible_ladders_are_refused(exact: Ops) -> None:
    options = {"rows_per_seq": 1, "num_seqs": [1, 2], "max_contexts": [64], "block_tokens": 16}
    for name in ("num_seqs", "max_contexts"):
        for ladder in ([], [2, 2], [4, 1]):
            with pytest.raises(ValueError, match="ascends"):
                PassGraphs(lambda batch, _: batch.positions_R, exact, **{**options, name: ladder})
    with pytest.raises(ValueError, match="cpu/exact/float32 pads batches to 8 rows"):
        PassGraphs(lambda batch, _: batch.positions_R, load_ops("cpu"), **options)
