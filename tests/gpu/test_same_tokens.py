"""`exact` on the card: the same tokens however a request is served, for pages in full and in fp8.

The reference computes every request alone, without drafts, recordings or a prefix cache, in one chunk.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from llm_engine.api.messages import Submit
from llm_engine.api.request import pack_tokens, unpack_tokens
from llm_engine.runtime.batch import SequenceRows, build_batch
from llm_engine.sched import Failure
from tests.gpu.lab import BLOCK, Lab, StagedPair, requests
from tests.unit.runtime.harness import Driver

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(100)]

LENGTHS = (1, 15, 17, 33, 48, 50, 64, 65, 80, 90, 120, 130)
NUM_OUTPUT = 12
Outputs = dict[str, list[int]]


@pytest.fixture(scope="module", params=["bf16-auto", "bf16-fp8"])
def lab(request: pytest.FixtureRequest, tiny_dir: Path, card: Any) -> Lab:
    dtype, pages = request.param.split("-")
    return Lab.load(tiny_dir, numerics="exact", dtype=dtype, pages=pages)


@pytest.fixture(scope="module")
def submits(lab: Lab) -> list[Submit]:
    return requests(lab.spec, LENGTHS, NUM_OUTPUT)


@pytest.fixture(scope="module")
def outputs(lab: Lab, submits: list[Submit]) -> Outputs:
    alone = lab.alone(submits)
    assert {len(tokens) for tokens in alone.values()} == {NUM_OUTPUT}
    assert len({tuple(tokens) for tokens in alone.values()}) == len(LENGTHS), "the comparison can fail"
    return alone


def serve(driver: Driver, submits: list[Submit]) -> Outputs:
    for submit in submits:
        driver.add(submit)
    driver.run()
    return driver.outputs


@pytest.mark.parametrize("beside", [1, 100])
def test_a_row_has_the_same_bits_beside_others(lab: Lab, beside: int) -> None:
    """A decode row in a pass with a chunk of another sequence. The smallest piece of what the others here promise."""
    rng = random.Random(beside)
    store = lab.store(40, with_mtp=False)
    tables = [list(range(20))[::-1], list(range(20, 40))]
    tokens = [[rng.randrange(3, lab.spec.num_tokens) for _ in range(length)] for length in (100, beside)]

    def states(*rows: SequenceRows) -> torch.Tensor:
        batch = build_batch(rows, block_tokens=BLOCK, row_tile=1).to(lab.ops.device)
        return lab.model.forward(batch, store)

    states(SequenceRows(tokens[0][:99], 0, tables[0]))
    last, chunk = SequenceRows(tokens[0][99:], 99, tables[0]), SequenceRows(tokens[1], 0, tables[1])
    alone = states(last)[0].clone()
    together = states(last, chunk)
    assert torch.equal(together[0], alone)
    assert torch.equal(states(chunk), together[1:])


@pytest.mark.parametrize(("num_drafts", "graphs"), [(0, True), (1, False), (2, True), (3, True)])
def test_in_batches(lab: Lab, submits: list[Submit], outputs: Outputs, num_drafts: int, graphs: bool) -> None:
    driver, _ = lab.driver(num_drafts=num_drafts, graphs=graphs, chunk=32, max_num_seqs=8)
    assert serve(driver, submits) == outputs


@pytest.mark.parametrize("chunk", [16, 48])
def test_in_chunks(lab: Lab, submits: list[Submit], outputs: Outputs, chunk: int) -> None:
    driver, _ = lab.driver(num_drafts=1, chunk=chunk, max_num_seqs=12)
    assert serve(driver, submits) == outputs


def test_with_a_warm_prefix_cache(lab: Lab, submits: list[Submit], outputs: Outputs) -> None:
    driver, _ = lab.driver(num_drafts=2, graphs=True, chunk=64)
    assert serve(driver, submits) == outputs
    driver.outputs.clear()
    again = [msgspec.structs.replace(submit, attempt=submit.attempt + 1) for submit in submits]
    assert serve(driver, again) == outputs
    assert sum(result.stats.cached_tokens for result in driver.results) > 0


def test_after_preemption(lab: Lab) -> None:
    """Too few blocks: sequences are handed back and come again with what they have."""
    submits = requests(lab.spec, [20, 21, 22, 23, 24, 25, 26, 27], 60)
    driver, _ = lab.driver(num_drafts=1, num_blocks=20, chunk=64, max_num_seqs=8, prefix_cache=False)
    waiting = {submit.request_id: submit for submit in submits}
    for submit in submits:
        driver.add(submit)
    for _ in range(4000):
        result = driver.step()
        for failure in driver.failed:
            _resubmit(driver, failure, waiting)
        driver.failed.clear()
        if result is None and len(driver.finishes) == len(submits):
            break
    assert driver.outputs == lab.alone(submits)
    assert sum(result.stats.preempted for result in driver.results) > 0, "nothing was preempted"


def _resubmit(driver: Driver, failure: Failure, waiting: dict[str, Submit]) -> None:
    assert failure.retryable, failure.reason
    old = waiting[failure.seq.request_id]
    prompt = unpack_tokens(old.tokens)[: old.num_prompt]
    tokens = pack_tokens([*prompt, *driver.outputs[old.request_id]])
    new = msgspec.structs.replace(old, attempt=old.attempt + 1, tokens=tokens)
    waiting[old.request_id] = new
    driver.add(new)


@pytest.mark.parametrize("num_drafts", [0, 2])
def test_handed_over_through_host_memory(lab: Lab, submits: list[Submit], outputs: Outputs, num_drafts: int) -> None:
    pair = StagedPair(lab, num_drafts, graphs=True, chunk=32)
    few = submits[:8]
    assert pair.run(few) == {submit.request_id: outputs[submit.request_id] for submit in few}
