"""Drafts stay on the device: nothing reads them before the tokens of the step, and each one feeds the next pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llm_engine.ops import ForwardBatch
from llm_engine.runtime.batch import fill_in
from llm_engine.runtime.drafts import Drafts
from llm_engine.runtime.kv_store import KvStore
from llm_engine.runtime.runner import Runner
from llm_engine.runtime.speculate import Speculator
from llm_engine.sched.paged_cache import PagedCache
from llm_engine.sched.sequence import Sequence
from tests.unit.runtime.fake_model import BLOCK, SPEC, VOCAB, FakeModel, make_store
from tests.unit.runtime.harness import PROMPT, expected_output, fake_driver, prompt_of
from tests.unit.sched.requests import sequence_of

META = torch.device("meta")


class Shapes:
    """A model of tensors without values: whoever reads one fails."""

    spec, max_len, row_tile, dtype, has_mtp = SPEC, 64, 1, torch.float32, True

    def __init__(self) -> None:
        self.mtp_rows: list[int] = []

    def forward(self, batch: ForwardBatch, store: KvStore, on_layer: Callable[[int], None] | None = None) -> Tensor:
        assert batch.token_ids_R.is_meta
        return torch.empty(len(batch.token_ids_R), 2, device=META)

    def logits(self, hidden_MH: Tensor) -> Tensor:
        return hidden_MH.new_empty(len(hidden_MH), VOCAB)

    def mtp(self, batch: ForwardBatch, hidden_RH: Tensor, store: KvStore) -> Tensor:
        assert batch.token_ids_R.is_meta
        self.mtp_rows.append(len(hidden_RH))
        return torch.empty_like(hidden_RH)

    draft_logits = logits


def _drafting(model: Shapes) -> tuple[Speculator, Runner, list[Sequence]]:
    """Greedy, sampled, filtered and penalised sequences whose last verified state waits."""
    store = KvStore.allocate(make_store(64).layout, torch.float32, META)
    cache = PagedCache(64, BLOCK, format_id="shapes", with_mtp=True)
    runner = Runner(model, store, 4)
    speculator = Speculator(runner, cache)
    options: list[dict[str, float]] = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 1.0, "top_k": 3, "top_p": 0.9},
        {"temperature": 0.5, "presence_penalty": 1.0, "frequency_penalty": 0.5, "min_tokens": 9},
    ]
    seqs = [sequence_of(PROMPT, f"r{i}", num_prompt=8, **own) for i, own in enumerate(options)]
    for seq in seqs:
        seq.stop_ids = frozenset([1])
        assert cache.begin(seq, headroom=0)
        assert cache.grow(seq, len(PROMPT) + 4)
        seq.num_computed = seq.num_drafted = len(PROMPT) - 1
        runner.open(seq)
        speculator.observe(seq, len(PROMPT) - 2, torch.empty(1, 2, device=META))
    return speculator, runner, seqs


def test_nothing_is_read_until_the_tokens_are() -> None:
    model = Shapes()
    speculator, runner, seqs = _drafting(model)
    drafts = speculator.propose(seqs, [3, 1, 2, 3])
    assert [len(drafts.places(seq)) for seq in seqs] == [3, 1, 2, 3]
    assert sorted(place for seq in seqs for place in drafts.places(seq)) == list(range(9))
    assert model.mtp_rows == [4, 3, 2], "one pass more for each further draft, of the sequences that want one"
    with pytest.raises(NotImplementedError, match="meta"):
        runner.finish(runner.launch(seqs, [], drafts))


def test_sequences_that_want_no_drafts_only_catch_up() -> None:
    model = Shapes()
    speculator, _, seqs = _drafting(model)
    assert len(speculator.propose(seqs, [0, 0, 0, 0])) == 0
    assert model.mtp_rows == [4]
    assert len(speculator.propose(seqs, [3, 3, 3, 3])) == 0, "nothing waits, so there is no state to draft from"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_every_draft_builds_on_the_one_before(temperature: float, penalty: float) -> None:
    """A draft layer that is always right: all drafts are accepted, also where they count for penalties."""
    options = {"temperature": temperature, "presence_penalty": penalty, "frequency_penalty": penalty / 2}
    submits = [prompt_of(f"r{i}", [i, *PROMPT], max_tokens=9 + i, **options) for i in range(5)]
    driver = fake_driver(num_drafts=3, model=FakeModel(wrong_every=10**9))
    for submit in submits:
        driver.add(submit)
    driver.run()
    for submit in submits:
        assert driver.outputs[submit.request_id] == expected_output(submit)
    stats = [result.stats for result in driver.results]
    assert sum(sum(s.drafts) for s in stats) >= 25
    assert all(s.accepted == s.drafts for s in stats)


def test_rows_that_stand_for_late_tokens_take_them() -> None:
    ids = torch.tensor([7, -1, -3, 0, -2, -2])
    assert fill_in(ids, torch.tensor([11, 12, 13])).tolist() == [7, 11, 13, 0, 12, 12]


def test_drafts_outlive_what_the_sampler_returned() -> None:
    """Results of recordings are written over by the next pass."""
    seqs = [sequence_of([5], f"r{i}") for i in range(2)]
    drafts = Drafts()
    drawn = torch.tensor([[3.0, 0.5], [4.0, 0.5]], dtype=torch.float64)
    ids = drafts.add(seqs, drawn)
    drawn.fill_(-7.0)
    drafts.add(seqs[1:], drawn[:1] + 13.0)
    assert ids.tolist() == [3, 4]
    assert torch.cat(drafts.drawn())[:, 0].tolist() == [3.0, 4.0, 6.0]
    assert drafts.places(seqs[1]) == [1, 2]
    assert drafts.ids_of(seqs[1]).tolist() == [4, 6]
