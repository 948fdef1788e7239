"""Every option against a slow single-row definition; draws follow the distribution; a row never sees its batch."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from torch import Tensor

from llm_engine.api.request import TokenLogprobs
from llm_engine.ops.noise import ExponentialNoise, mix_seed, position_keys
from llm_engine.runtime.drafts import Drafts
from llm_engine.runtime.draws import INVALID, Drawn, DrawRows
from llm_engine.runtime.ranking import keep_most_likely
from llm_engine.runtime.sampler import Sampler
from llm_engine.sched.sequence import Sequence
from tests.unit.sched.requests import sequence_of

CPU = torch.device("cpu")
VOCAB = 37
EOS = 1


def _sequences(count: int, **options: object) -> list[Sequence]:
    """Sequences with a slot each and two output tokens."""
    seqs = [sequence_of([5, 6, 7, 5, 9], f"r{i}", num_prompt=3, **{"seed": i, **options}) for i in range(count)]
    for slot, seq in enumerate(seqs):
        seq.slot = slot
        seq.stop_ids = frozenset(seq.submit.sampling.stop_token_ids) | {EOS}
    return seqs


def _drafted(seqs: list[Sequence], ids: list[list[int]]) -> Drafts:
    """Drafts as the device has them: a round for the first of every sequence, one for the second …"""
    drafts = Drafts()
    for num in range(max(map(len, ids), default=0)):
        places = [i for i, own in enumerate(ids) if len(own) > num]
        drafts.add([seqs[i] for i in places], torch.tensor([[ids[i][num], 1.0] for i in places], dtype=torch.float64))
    return drafts


def _draw(logits: Tensor, seqs: list[Sequence], drafts: list[list[int]] | None = None) -> Drawn:
    sampler = Sampler(max(seq.slot for seq in seqs) + 1, logits.shape[1], CPU)
    for seq in seqs:
        sampler.open(seq)
    drafts = drafts or [[] for _ in seqs]
    before = logits.clone()
    counts = [1 + len(own) for own in drafts]
    drawn = sampler.draw(logits, DrawRows(seqs, [0] * len(seqs), counts, _drafted(seqs, drafts)))
    assert torch.equal(logits.view(torch.int32), before.view(torch.int32)), "the logits are the caller's"
    assert drawn.drafts == drafts
    return drawn


def _oracle(logits: Tensor, seq: Sequence, drafts: list[int]) -> int:
    """The draw of one row after some drafts, straight from the definition."""
    params = seq.submit.sampling
    output = [*seq.tokens[seq.submit.num_prompt :], *drafts]
    row = logits.numpy().copy()
    for token, bias in params.logit_bias.items():
        row[token] += np.float32(bias)
    for token in set(output):
        row[token] -= np.float32(params.frequency_penalty * output.count(token))
        row[token] -= np.float32(params.presence_penalty)
    if len(output) < params.min_tokens:
        row[[token for token in seq.stop_ids if token < len(row)]] = -np.inf
    if params.temperature == 0:
        return int(row.argmax())
    scaled = row.astype(np.float64) / params.temperature
    probs = np.exp(scaled - scaled.max())
    probs /= probs.sum()
    order = sorted(range(len(row)), key=lambda token: (-probs[token], token))
    order = order[: params.top_k or None]
    total, mass, kept = sum(probs[token] for token in order), 0.0, []
    for token in order:
        if mass < params.top_p * total:
            kept.append(token)
        mass += probs[token]
    position = len(seq.tokens) + len(drafts)
    key = position_keys(np.array([mix_seed(params.seed)], np.uint64), np.array([position]))
    noise = ExponentialNoise(len(row), CPU)(key)[0].tolist()
    return max(kept, key=lambda token: probs[token] / noise[token])


def _random_options(rng: random.Random) -> dict[str, object]:
    options: dict[str, object] = {"seed": rng.randrange(-9, 2**63), "temperature": rng.choice([0.0, 0.3, 1.0, 2.5])}
    if rng.random() < 0.4:
        options["top_k"] = rng.choice([1, 2, 5, VOCAB, 500])
    if rng.random() < 0.4:
        options["top_p"] = rng.choice([1e-6, 0.3, 0.9, 0.999])
    if rng.random() < 0.3:
        options["presence_penalty"] = rng.choice([-1.5, 0.5, 2.0])
    if rng.random() < 0.3:
        options["frequency_penalty"] = rng.choice([-1.0, 0.7])
    if rng.random() < 0.3:
        options["logit_bias"] = {rng.randrange(VOCAB): rng.choice([-100.0, 3.0, 100.0]) for _ in range(3)}
    if rng.random() < 0.3:
        options["min_tokens"] = rng.randint(1, 6)
        options["stop_token_ids"] = (3, 8, 9999)
    if rng.random() < 0.3:
        options["logprobs"] = rng.choice([0, 1, 5])
    return options


def _random_batch(seed: int) -> tuple[list[Sequence], list[list[int]], Tensor]:
    """Sequences with random options and 0 to 3 drafts each; some rows have ties."""
    rng = random.Random(seed)
    seqs, drafts = [], []
    for slot in range(rng.randint(1, 12)):
        seq = _sequences(1, **_random_options(rng))[0]
        seq.slot = slot
        seq.tokens += [rng.randrange(VOCAB) for _ in range(rng.randrange(4))]
        drafts.append([rng.randrange(VOCAB) for _ in range(rng.randrange(4))])
        seqs.append(seq)
    logits = torch.randn(sum(1 + len(own) for own in drafts), VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    logits[::3] = logits[::3].round()
    logits[:, EOS] += 4
    logits[:, VOCAB - 2 :] = -math.inf
    return seqs, drafts, logits


@pytest.mark.parametrize("seed", range(60))
def test_every_row_draws_what_the_definition_says(seed: int) -> None:
    seqs, drafts, logits = _random_batch(seed)
    before = [(seq, own[:n]) for seq, own in zip(seqs, drafts, strict=True) for n in range(1 + len(own))]
    expected = [_oracle(row, seq, given) for row, (seq, given) in zip(logits, before, strict=True)]
    assert _draw(logits, seqs, drafts).tokens == expected


@pytest.mark.parametrize("seed", range(60))
def test_a_row_draws_the_same_alone(seed: int) -> None:
    seqs, drafts, logits = _random_batch(seed)
    together = _draw(logits, seqs, drafts)
    row = 0
    for seq, own in zip(seqs, drafts, strict=True):
        for n in range(1 + len(own)):
            sampler = Sampler(seq.slot + 1, VOCAB, CPU)
            sampler.open(seq)
            alone = sampler.draw(logits[row : row + 1], DrawRows([seq], [n], [1], _drafted([seq], [own[:n]])))
            assert alone.tokens == together.tokens[row : row + 1]
            assert alone.logprobs.get(0) == together.logprobs.get(row)
            row += 1


@pytest.mark.parametrize("vocab", [1, 5, 64, 515, 1024, 4099])
def test_probabilities_have_the_same_bits_in_any_batch(vocab: int) -> None:
    """The library's softmax must work row by row, or seeded draws would depend on the batch."""
    logits = torch.randn(33, vocab, generator=torch.Generator().manual_seed(vocab)) * 5
    together, logs = logits.softmax(-1), logits.log_softmax(-1)
    top_k = torch.full((33,), max(1, vocab // 3))
    kept = keep_most_likely(together, top_k, torch.full((33,), 0.8, dtype=torch.float64))
    for row in range(33):
        assert torch.equal(logits[row : row + 1].softmax(-1)[0], together[row])
        assert torch.equal(logits[row : row + 1].log_softmax(-1)[0], logs[row])
        alone = keep_most_likely(together[row : row + 1], top_k[:1], torch.tensor([0.8], dtype=torch.float64))
        assert torch.equal(alone[0], kept[row])


def test_draws_follow_the_distribution() -> None:
    """Chi-square of many positions of one seed, and of many seeds at one position."""
    n, vocab = 20_000, 24
    logits = torch.linspace(-3, 3, vocab)
    probs = (logits.double() / 1.3).softmax(-1).numpy()
    by_position, by_seed = [], []
    for start in range(0, n, 500):
        seqs = _sequences(500, temperature=1.3)
        for i, seq in enumerate(seqs):
            seq.tokens += [4] * i
        same = [sequence_of([5] * (start + 1), "r", seed=11, temperature=1.3)]
        same[0].slot = 0
        by_position += _draw(logits.repeat(500, 1), same, [[1] * 499]).tokens
        seqs = _sequences(500, temperature=1.3)
        for i, seq in enumerate(seqs):
            seq.submit = sequence_of([5], seed=start + i, temperature=1.3).submit
            seq.tokens = [5, 5]
        by_seed += _draw(logits.repeat(500, 1), seqs).tokens
    for tokens in (by_position, by_seed):
        counts = np.bincount(tokens, minlength=vocab)
        chi_square = float(((counts - n * probs) ** 2 / (n * probs)).sum())
        assert abs(chi_square - (vocab - 1)) < 4 * math.sqrt(2 * (vocab - 1))


def test_close_distributions_draw_the_same_token() -> None:
    """What makes drafts of an approximate distribution worth verifying above temperature 0."""
    seqs = _sequences(400, temperature=1.0)
    logits = torch.randn(400, 64, generator=torch.Generator().manual_seed(0))
    near = logits + 0.05 * torch.randn(400, 64, generator=torch.Generator().manual_seed(1))
    agree = sum(a == b for a, b in zip(_draw(logits, seqs).tokens, _draw(near, seqs).tokens, strict=True))
    assert agree > 360


def test_the_lowest_id_wins_a_tie() -> None:
    logits = torch.zeros(2, VOCAB)
    logits[:, [9, 20, 30]] = 1.0
    assert _draw(logits, _sequences(2)).tokens == [9, 9]
    assert _draw(logits, _sequences(2, temperature=1.0, top_k=1)).tokens == [9, 9]
    probs = torch.tensor([[0.1, 0.3, 0.3, 0.3]])
    kept = keep_most_likely(probs, torch.tensor([2]), torch.tensor([1.0], dtype=torch.float64))
    assert (kept > 0).tolist() == [[False, True, True, False]]


def test_top_p_keeps_the_fewest_that_hold_the_mass() -> None:
    probs = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).repeat(4, 1)
    top_p = torch.tensor([0.5, 0.500001, 0.75, 1.0], dtype=torch.float64)
    kept = keep_most_likely(probs, torch.full((4,), 4), top_p)
    assert (kept > 0).sum(dim=-1).tolist() == [1, 2, 2, 4]


def test_logprobs_are_those_of_the_raw_distribution() -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(4))
    seqs = _sequences(3, temperature=0.5, top_k=3, logit_bias={2: 100.0}, logprobs=4)
    seqs[1] = _sequences(2)[1]
    drawn = _draw(logits, seqs)
    assert drawn.tokens[0] == drawn.tokens[2] == 2
    assert set(drawn.logprobs) == {0, 2}
    expected = logits.double().log_softmax(-1)
    for row in (0, 2):
        got = drawn.logprobs[row]
        assert isinstance(got, TokenLogprobs)
        assert got.logprob == pytest.approx(expected[row, 2].item(), abs=1e-5)
        assert got.top_ids == expected[row].argsort(descending=True)[:4].tolist()
        assert got.top_logprobs == pytest.approx(expected[row].sort(descending=True).values[:4].tolist(), abs=1e-5)


def test_penalties_count_output_and_earlier_drafts_but_not_the_prompt() -> None:
    seq = sequence_of([3, 3, 3, 4], num_prompt=3, frequency_penalty=1.0)
    seq.slot = 0
    logits = torch.zeros(3, 8)
    logits[:, 3:6] = torch.tensor([0.9, 1.95, 1.0])
    assert _draw(logits, [seq], [[4, 5]]).tokens == [5, 5, 3]


def test_drafts_end_before_the_first_that_was_not_finite() -> None:
    seqs = _sequences(3)
    sampler = Sampler(3, VOCAB, CPU)
    for seq in seqs:
        sampler.open(seq)
    drafts = Drafts()
    for scores in ([1.0, math.nan, 2.0], [1.0, 1.0, math.inf], [math.nan, 1.0, 1.0]):
        drafts.add(seqs, torch.tensor([[slot, score] for slot, score in enumerate(scores)], dtype=torch.float64))
    drawn = sampler.draw(torch.zeros(12, VOCAB), DrawRows(seqs, [0] * 3, [4] * 3, drafts))
    assert drawn.drafts == [[0, 0], [], [2]]
    assert drawn.tokens == [0] * 12


def test_counts_follow_a_sequence_as_it_grows() -> None:
    seq = sequence_of([3], presence_penalty=1.0)
    seq.slot = 0
    sampler = Sampler(1, 8, CPU)
    sampler.open(seq)
    logits = torch.linspace(0, 0.7, 8).unsqueeze(0)
    for expected in (7, 6, 5, 4):
        token = sampler.draw(logits, DrawRows([seq], [0], [1])).tokens[0]
        assert token == expected
        seq.tokens.append(token)


def test_a_slot_forgets_its_last_sequence() -> None:
    sampler = Sampler(1, 8, CPU)
    first = sequence_of([3], logit_bias={2: 100.0})
    first.slot = 0
    sampler.open(first)
    sampler.close(0)
    second = sequence_of([3])
    second.slot = 0
    sampler.open(second)
    assert sampler.draw(torch.linspace(0, 1, 8).unsqueeze(0), DrawRows([second], [0], [1])).tokens == [7]


def test_rows_that_are_not_finite_are_told() -> None:
    logits = torch.zeros(5, VOCAB)
    logits[0, 4] = math.nan
    logits[1, 4] = math.nan
    logits[2] = -math.inf
    logits[3, 4] = math.inf
    logits[4, 6] = 1.0
    greedy = _draw(logits, _sequences(5)).tokens
    assert greedy == [INVALID, INVALID, INVALID, INVALID, 6]
    sampled = _draw(logits, _sequences(5, temperature=1.0, logprobs=1))
    assert sampled.tokens[:4] == [INVALID] * 4
    assert sampled.tokens[4] != INVALID
    assert set(sampled.logprobs) == {4}
