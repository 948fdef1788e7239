"""One model, one prompt, one set of parameters: the same tokens and, bit for bit, the same logits, however served.

The reference decodes every request alone, without drafts, in one chunk, with an empty cache. The weights are random, so
a single wrong cache row shows within a few tokens; greedy and sampled requests of every option run side by side.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from llm_engine.api.messages import Role, Submit
from llm_engine.api.request import pack_tokens
from llm_engine.models.deepseek_v32 import CausalLM, build_model
from llm_engine.models.spec import ModelSpec
from llm_engine.ops.load import load_ops
from llm_engine.runtime.draws import Drawing, Drawn
from llm_engine.runtime.engine import Engine
from llm_engine.runtime.kv_store import KvStore, plan_layout
from llm_engine.runtime.sampler import Sampler
from llm_engine.runtime.weights import load_weights
from llm_engine.sched import Reservation, Sequence
from tests.unit.runtime.harness import Driver, config_of
from tests.unit.sched.requests import submit_of

NUM_OUTPUT = 14
BLOCK = 16


class RecordingSampler(Sampler):
    """Keeps the logits of every row that verifies or draws a token: (request, position, drafts before it) → bits."""

    def __init__(self, model: CausalLM, num_slots: int) -> None:
        super().__init__(num_slots, model.spec.vocab_size, torch.device("cpu"))
        self.seen: dict[tuple[str, int, tuple[int, ...]], Tensor] = {}

    def finish(self, drawing: Drawing) -> Drawn:
        drawn, rows, row = super().finish(drawing), drawing.rows, 0
        for seq, count, drafts in zip(rows.seqs, rows.counts, drawn.drafts, strict=True):
            assert count == 1 + len(drafts)
            for i in range(count):
                self.seen[seq.request_id, len(seq.tokens) + i, tuple(drafts[:i])] = drawing.logits_RV[row + i].clone()
            row += count
        return drawn


@dataclass
class Lab:
    """The model, the requests, and what each of them must give."""

    model: CausalLM
    submits: list[Submit]
    outputs: dict[str, list[int]] = field(default_factory=dict)
    logits: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def driver(
        self, role: Role = Role.AGGREGATED, num_drafts: int = 0, num_blocks: int = 160, **options: Any
    ) -> Driver:
        config = config_of(num_drafts=num_drafts, max_num_seqs=20, **options)
        kv = config.kv.model_copy(update={"num_blocks": num_blocks, "block_tokens": BLOCK})
        layout = plan_layout(self.model.spec, kv, torch.float32, with_mtp=num_drafts > 0)
        store = KvStore.allocate(layout, torch.float32)
        store.arena.view(torch.float32).fill_(1e4)  # reading a row that was never written changes everything
        engine = Engine(config, self.model, store, role=role, format_id="nano")
        engine._runner.sampler = RecordingSampler(self.model, 20)
        return Driver(engine)

    def verify(self, *drivers: Driver, names: set[str] | None = None) -> None:
        """All outputs, and every logits row whose drafts turned out right."""
        num_rows = 0
        for driver in drivers:
            sampler = driver.engine._runner.sampler
            assert isinstance(sampler, RecordingSampler)
            for (name, position, drafts), row in sampler.seen.items():
                prompt = next(submit.num_prompt for submit in self.submits if submit.request_id == name)
                index = position - prompt
                if list(drafts) == self.outputs[name][index - len(drafts) : index] and (name, position) in self.logits:
                    assert torch.equal(row, self.logits[name, position]), f"{name}: logits at {position}"
                    num_rows += 1
        for submit in self.submits:
            if names is None or submit.request_id in names:
                assert drivers[-1].outputs[submit.request_id] == self.outputs[submit.request_id], submit.request_id
        assert num_rows >= NUM_OUTPUT


def _requests(spec: ModelSpec) -> list[Submit]:
    """16 requests: prompts of 1 to 90 tokens, half of them with a shared prefix, with every sampling option."""
    rng = random.Random(5)
    shared = [rng.randrange(3, spec.num_tokens) for _ in range(48)]
    options: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.9},
        {"temperature": 1.0, "presence_penalty": 1.0, "frequency_penalty": 0.5, "logit_bias": {7: 2.0}},
        {"temperature": 0.0, "frequency_penalty": 1.5, "min_tokens": 5},
    ]
    submits = []
    for i, length in enumerate((1, 2, 15, 16, 17, 31, 33, 48, 49, 50, 63, 64, 65, 80, 90, 90)):
        prefix = shared[:length] if i % 2 else []
        prompt = prefix + [rng.randrange(3, spec.num_tokens) for _ in range(length - len(prefix))]
        extra = {"seed": 1000 + i, "max_tokens": NUM_OUTPUT, "ignore_eos": True, **options[i % len(options)]}
        submits.append(submit_of(prompt, f"r{i}", **extra))
    return submits


@pytest.fixture(scope="module")
def lab(nano_dir: Path) -> Lab:
    spec, ops = ModelSpec.from_dir(nano_dir), load_ops("cpu")
    model = build_model(spec, load_weights(nano_dir, spec, ops.dtype, with_mtp=True), ops, 256)
    lab = Lab(model, _requests(spec))
    for submit in lab.submits:
        driver = lab.driver(chunk=256)
        driver.add(submit)
        driver.run()
        sampler = driver.engine._runner.sampler
        assert isinstance(sampler, RecordingSampler)
        lab.outputs |= driver.outputs
        lab.logits |= {(name, position): row for (name, position, _), row in sampler.seen.items()}
    assert len(lab.logits) == 16 * NUM_OUTPUT
    return lab


@pytest.mark.parametrize("num_drafts", [0, 1, 3])
@pytest.mark.parametrize("chunk", [16, 48, 256])
def test_in_a_mixed_batch_cold_and_warm(lab: Lab, num_drafts: int, chunk: int) -> None:
    driver = lab.driver(num_drafts=num_drafts, chunk=chunk)
    rng = random.Random(chunk + num_drafts)
    waiting = rng.sample(lab.submits, len(lab.submits))
    while waiting:  # arrivals trickle in, so chunks and decode rows of others share every step
        driver.add(waiting.pop())
        for _ in range(rng.randrange(3)):
            driver.step()
    driver.run()
    lab.verify(driver)
    cold = sum(result.stats.cached_tokens for result in driver.results)
    driver.outputs.clear()
    for submit in lab.submits:
        driver.add(msgspec.structs.replace(submit, attempt=2))
    driver.run()
    lab.verify(driver)
    warm = sum(result.stats.cached_tokens for result in driver.results) - cold
    assert warm == sum((submit.num_prompt - 1) // BLOCK * BLOCK for submit in lab.submits) > cold


@pytest.mark.parametrize("num_drafts", [1, 3])
def test_alone_with_drafts(lab: Lab, num_drafts: int) -> None:
    for submit in lab.submits[::3]:
        driver = lab.driver(num_drafts=num_drafts)
        driver.add(submit)
        driver.run()
        lab.verify(driver, names={submit.request_id})


@pytest.mark.parametrize("num_drafts", [0, 1])
def test_resumed_after_any_number_of_tokens(lab: Lab, num_drafts: int) -> None:
    driver = lab.driver(num_drafts=num_drafts, chunk=48)
    for emitted in range(NUM_OUTPUT):
        for submit in lab.submits[emitted % 2 :: 2]:
            output = lab.outputs[submit.request_id][:emitted]
            tokens = submit.tokens + pack_tokens(output)
            driver.outputs[submit.request_id] = list(output)
            driver.add(msgspec.structs.replace(submit, tokens=tokens, attempt=1 + emitted))
        driver.run()
    lab.verify(driver)


@pytest.mark.parametrize("num_drafts", [0, 1, 3])
def test_prefilled_here_decoded_there(lab: Lab, num_drafts: int) -> None:
    p = lab.driver(Role.PREFILL, num_drafts, chunk=48)
    d = lab.driver(Role.DECODE, num_drafts)
    d.outputs = p.outputs
    for submit in lab.submits:
        p.add(submit)
    handed_over = 0
    while p.step() is not None or d.step() is not None:
        d.step()
        for prefilled in p.prefilled[handed_over:]:
            _move(p.engine, prefilled.seq, d.engine, prefilled.first)
            handed_over += 1
    assert handed_over == 16
    lab.verify(p, d)
    assert p.engine.is_idle
    assert d.engine.is_idle


def test_preempted_and_resumed(lab: Lab) -> None:
    """Blocks for a few sequences only: most are handed back at some point and come again with what they had."""
    driver = lab.driver(num_drafts=1, num_blocks=8, chunk=256)
    submits = {submit.request_id: submit for submit in lab.submits}
    attempts = dict.fromkeys(submits, 1)
    for submit in lab.submits:
        driver.add(submit)
    num_preempted = 0
    for _ in range(2000):
        result = driver.step()
        if result is None:
            break
        for failure in result.failed:
            name = failure.seq.request_id
            assert failure.code == "preempted"
            num_preempted += 1
            attempts[name] += 1
            tokens = submits[name].tokens + pack_tokens(driver.outputs[name])
            driver.add(msgspec.structs.replace(submits[name], tokens=tokens, attempt=attempts[name]))
    lab.verify(driver)
    assert num_preempted >= 2


def _move(source: Engine, seq: Sequence, target: Engine, first: Any) -> None:
    """A hand-off without a network: copy every plane of the blocks that the target lacks."""
    reservation = target.reserve(seq.submit, seq.submit.num_prompt)
    assert isinstance(reservation, Reservation)
    ours, theirs = source._runner._store, target._runner._store
    pairs = list(zip(ours.layers, theirs.layers, strict=True))
    if ours.mtp is not None and theirs.mtp is not None:
        pairs.append((ours.mtp, theirs.mtp))
    for i, block in enumerate(reservation.blocks, reservation.have_tokens // BLOCK):
        for mine, yours in pairs:
            yours.latent[block] = mine.latent[seq.blocks[i]]
            assert mine.index is not None
            assert yours.index is not None
            yours.index[block] = mine.index[seq.blocks[i]]
    target.admit(seq.submit, reservation, first)
    source.release_sent(seq)
