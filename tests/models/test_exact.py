"""`exact` numerics: bit for bit, no row's result depends on chunking, on its batch or on where its blocks lie."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from llm_engine.ops import load_ops
from tests.models.harness import Harness, random_tokens

LENGTHS = {"nano": 90, "nano_v3": 60, "tiny": 110, "tiny_v3": 80}  # well beyond a selection where there is an indexer
Pieces = list[list[tuple[int, int, int]]]  # passes of (sequence, start, end)


@pytest.fixture(
    scope="module",
    params=[
        *((size, "fp32") for size in LENGTHS),
        ("nano", "bf16"),
        pytest.param(("tiny", "bf16"), marks=pytest.mark.slow),
    ],
    ids="-".join,
)
def case(request: pytest.FixtureRequest) -> tuple[Harness, list[list[int]], list[tuple[Tensor, Tensor]]]:
    """A model, three texts, and their logits and MTP states when each is computed alone in one pass."""
    size, dtype = request.param
    path: Path = request.getfixturevalue(f"{size}_dir")
    harness = Harness.load(path, load_ops("cpu", "exact", dtype), num_seqs=3, max_len=256)
    texts = [random_tokens(harness.model.spec, LENGTHS[size] - 7 * seed, seed=seed) for seed in range(3)]
    alone = []
    for seq, text in enumerate(texts):
        hidden = harness.run([(seq, 0, text)])
        alone.append((harness.logits(hidden), harness.run_mtp([(seq, 0, text[1:])], hidden[:-1])))
    return harness, texts, alone


def replay(harness: Harness, texts: list[list[int]], pieces: Pieces) -> list[tuple[Tensor, Tensor]]:
    """The same texts in other passes; the MTP layer follows one token behind."""
    hidden: list[list[Tensor]] = [[] for _ in texts]
    drafts: list[list[Tensor]] = [[] for _ in texts]
    for piece in pieces:
        rows = [(seq, start, texts[seq][start:end]) for seq, start, end in piece]
        states = harness.run(rows).split([end - start for _, start, end in piece])
        for (seq, _, _), state in zip(piece, states, strict=True):
            hidden[seq].append(state)
        draft_rows = [(seq, start, texts[seq][start + 1 : end + 1]) for seq, start, end in piece]
        counts = [len(tokens) for _, _, tokens in draft_rows]
        inputs = torch.cat([state[:count] for state, count in zip(states, counts, strict=True)])
        kept = [row for row in draft_rows if row[2]]
        if kept:
            made = iter(harness.run_mtp(kept, inputs).split([len(tokens) for _, _, tokens in kept]))
            for seq, _, _ in kept:
                drafts[seq].append(next(made))
    return [(harness.logits(torch.cat(hidden[s])), torch.cat(drafts[s])) for s in range(len(texts))]


@st.composite
def passes(draw: st.DrawFn, lengths: list[int]) -> Pieces:
    """Any way to advance the sequences: each pass moves a random subset, in random order, by random lengths."""
    done = [0] * len(lengths)
    pieces: Pieces = []
    while any(at < length for at, length in zip(done, lengths, strict=True)):
        open_seqs = [seq for seq, length in enumerate(lengths) if done[seq] < length]
        order = draw(st.permutations(open_seqs))
        piece = []
        for seq in order[: draw(st.integers(1, len(order)))]:
            left = lengths[seq] - done[seq]
            step = min(left, draw(st.sampled_from([1, 2, 7, 16, 33, 64, 1000])))
            piece.append((seq, done[seq], done[seq] + step))
            done[seq] += step
        pieces.append(piece)
    return pieces


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_schedule_gives_the_same_bits(
    case: tuple[Harness, list[list[int]], list[tuple[Tensor, Tensor]]], data: st.DataObject
) -> None:
    harness, texts, alone = case
    pieces = data.draw(passes([len(text) for text in texts]))
    harness.scatter(3, 16, seed=data.draw(st.integers(0, 1 << 16)))
    harness.store.arena.view(harness.ops.dtype).fill_(torch.nan)
    for (logits, drafts), (logits_alone, drafts_alone) in zip(replay(harness, texts, pieces), alone, strict=True):
        assert torch.equal(logits, logits_alone)
        assert torch.equal(drafts, drafts_alone)


def test_recomputing_over_stale_rows_gives_the_same_bits(nano_dir: Path) -> None:
    """Rejected drafts leave rows behind that the next pass overwrites; nothing of them may show."""
    harness = Harness.load(nano_dir, load_ops("cpu", "exact", "fp32"))
    text = random_tokens(harness.model.spec, 60)
    clean = harness.logits(harness.in_chunks(text, [60]))
    harness.run([(0, 0, text[:40])])
    harness.run([(0, 40, [7, 8, 9])])  # drafts that turn out wrong
    again = torch.cat([clean[:40], harness.logits(harness.run([(0, 40, text[40:])]))])
    assert torch.equal(again, clean)


def test_bf16_agrees_with_fp32_on_planted_weights(tiny_planted_dir: Path) -> None:
    texts = random_tokens(264, 120)
    winners = []
    for dtype in ("fp32", "bf16"):
        harness = Harness.load(tiny_planted_dir, load_ops("cpu", "exact", dtype))
        winners.append(harness.logits(harness.run([(0, 0, texts)])).argmax(-1))
    assert (winners[0] == winners[1]).float().mean() > 0.98
