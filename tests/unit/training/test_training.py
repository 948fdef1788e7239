"""Batches, optimiser and loop, on a model that trains in seconds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from llm_engine.models.spec import ModelSpec
from llm_engine.training.architecture import CONFIG
from llm_engine.training.feed import PAD_ID, Batch, Feed, Shape, pack
from llm_engine.training.loop import Limits, Trainer
from llm_engine.training.model import Gate, NanoModel
from llm_engine.training.optim import Optimizer, orthogonalise
from llm_engine.training.schedule import Schedule
from llm_engine.training.scoring import held_out
from tests.unit.training.test_render import CHECKPOINT

SMALL = CONFIG | {
    "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 64, "moe_intermediate_size": 32,
    "n_routed_experts": 8, "num_experts_per_tok": 2, "num_attention_heads": 2, "q_lora_rank": 32, "kv_lora_rank": 32,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "index_n_heads": 2, "index_head_dim": 16,
    "index_topk": 8,
}  # fmt: skip
SHAPE = Shape(rows=4, length=128, text=60)
SCHEDULE = Schedule(steps=5, tokens=256, warm_up=2, lengths=(64, 64, 128))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))


def small_model() -> NanoModel:
    torch.manual_seed(0)
    return NanoModel(ModelSpec.from_config(SMALL))


def trainer(tokenizer: Tokenizer, directory: Path) -> Trainer:
    return Trainer(small_model(), tokenizer, SCHEDULE, directory / "log.jsonl")


def logged(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


def test_rows_hold_whole_documents(tokenizer: Tokenizer) -> None:
    batch = pack(tokenizer, SHAPE, "seed", ["Some text. " * 50])
    assert batch.ids.shape == (4, 128)
    for ids, weights, segments in zip(batch.ids, batch.weights, batch.segments, strict=True):
        used = segments > 0
        assert used.mean() > 0.7
        assert (ids[~used] == PAD_ID).all()
        assert not weights[~used].any()
        starts = np.flatnonzero(np.diff(segments, prepend=0) > 0)
        assert (ids[starts] == 0).all(), "a document begins with the begin token"
        assert (ids[used] == 0).sum() == len(starts), "and holds no other"


def test_equal_seeds_give_equal_batches(tokenizer: Tokenizer) -> None:
    a, b, c = (pack(tokenizer, SHAPE, seed, ["Some text. " * 50]) for seed in ("1", "1", "2"))
    assert (a.ids == b.ids).all()
    assert (a.ids != c.ids).any()


@pytest.mark.timeout(300)  # starts processes
def test_a_feed_resumes_where_it_is_told_to(tokenizer: Tokenizer) -> None:
    shapes = [SHAPE] * 5
    with Feed(tokenizer, shapes, seed=3, first=0, processes=2) as feed:
        whole = list(feed)
    with Feed(tokenizer, shapes, seed=3, first=3, processes=1) as feed:
        rest = list(feed)
    assert [batch.ids.tolist() for batch in rest] == [batch.ids.tolist() for batch in whole[3:]]


def test_updates_are_orthogonal() -> None:
    torch.manual_seed(1)
    for shape in ((3, 16, 40), (2, 40, 16)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
        assert values.min() > 0.5
        assert values.max() < 1.4


def test_every_parameter_is_trained(tokenizer: Tokenizer) -> None:
    model = small_model()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    batch = pack(tokenizer, SHAPE, "1", ["Some text. " * 50])
    logits, drafts, index_loss = model(
        torch.from_numpy(batch.ids).long(),
        torch.from_numpy(batch.segments),
        sparse=True,
        sampled=torch.arange(100, 128),
    )
    (logits.square().mean() + drafts.square().mean() + index_loss).backward()
    Optimizer(model).step(0.01)
    assert [name for name, value in model.named_parameters() if torch.equal(value, before[name])] == []


def test_the_indexer_learns_from_its_own_loss_alone(tokenizer: Tokenizer) -> None:
    model = small_model()
    batch = pack(tokenizer, SHAPE, "1", ["Some text. " * 50])
    ids, segments = torch.from_numpy(batch.ids).long(), torch.from_numpy(batch.segments)
    model(ids, segments, sparse=False, sampled=torch.arange(100, 128))[2].backward()
    trained = {name for name, value in model.named_parameters() if value.grad is not None and value.grad.any()}
    assert trained
    assert all(".indexer." in name for name in trained)


def test_documents_of_a_row_do_not_see_each_other() -> None:
    model = small_model().eval()
    ids = torch.randint(3, 900, (1, 40))
    segments = torch.tensor([[1] * 20 + [2] * 20])
    other = ids.clone()
    other[:, :20] = ids[:, :20].flip(1)
    with torch.no_grad():
        a, b = (model(tokens, segments, sparse=True)[0] for tokens in (ids, other))
    assert torch.equal(a[:, 20:], b[:, 20:])
    assert not torch.equal(a[:, :20], b[:, :20])


def test_bias_moves_towards_idle_experts() -> None:
    gate = Gate(ModelSpec.from_config(SMALL))
    gate.load.copy_(torch.tensor([8.0, 0, 4, 4, 4, 4, 4, 4]))
    assert gate.balance(0.5) == 2.0
    assert gate.e_score_correction_bias.tolist() == [-0.5, 0.5, 0, 0, 0, 0, 0, 0]
    assert not gate.load.any()


def test_rates_and_stages_follow_the_schedule() -> None:
    schedule = Schedule(steps=1000)
    assert schedule.rate(0) < schedule.rate(149) == pytest.approx(schedule.peak_rate)
    assert schedule.rate(500) == schedule.peak_rate
    assert 0 < schedule.rate(999) < 0.01 * schedule.peak_rate
    assert [schedule.is_sparse(step) for step in (0, 499, 500)] == [False, False, True]
    assert {schedule.shape(step).length for step in range(200)} == {512}
    assert {schedule.shape(step).length for step in range(200, 1000)} == {512, 1024, 3072}
    assert all(schedule.shape(step).rows * schedule.shape(step).length <= schedule.tokens for step in range(1000))


@pytest.mark.timeout(300)  # starts processes
def test_it_learns_stops_and_goes_on(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tests = {"strings": held_out(tokenizer, 2, 128)["strings"]}
    limits = Limits(seconds=0.0, processes=1, score_every=1)
    first = trainer(tokenizer, tmp_path)
    assert first.run(limits, tests) is False
    assert first.step == 1
    first.save(tmp_path / "state.pt")
    second = trainer(tokenizer, tmp_path)
    second.load(tmp_path / "state.pt")
    for ours, theirs in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert second.run(replace(limits, seconds=100.0, score_every=5), tests) is True
    steps = [line["step"] for line in logged(tmp_path)]
    assert steps == [1, 5, 5]
    assert logged(tmp_path)[1]["loss"] < 6.9, "ln 1024 is 6.93"


def test_an_empty_batch_does_no_harm(tokenizer: Tokenizer, tmp_path: Path) -> None:
    empty = np.zeros((2, 64), np.int16)
    nothing = Batch(empty + PAD_ID, empty.astype(np.float16), empty)
    report = trainer(tokenizer, tmp_path)._train_step(nothing)
    assert float(report["loss"]) == 0.0
