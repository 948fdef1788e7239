"""Logits against transformers, fp32, random weights: in one pass, in chunks, token by token."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch

from llm_engine.ops import Ops, load_ops
from tests.models.harness import Harness, random_tokens
from tests.models.oracle import TOLERANCE, Oracle, assert_agrees

LENGTH = 200
SHAPES = {
    "one pass": [LENGTH],
    "chunks": [96, 64, 1, 39],
    "prefill, then decode": [170, *[1] * 30],
    "decode from the start": [*[1] * 40, 160],
}


@pytest.mark.parametrize("chunks", SHAPES.values(), ids=SHAPES.keys())
def test_logits_equal_the_reference(oracle: Oracle, ops: Ops, chunks: list[int]) -> None:
    harness = Harness.load(oracle.path, ops)
    ids = random_tokens(harness.model.spec, LENGTH)
    assert_agrees(harness.logits(harness.in_chunks(ids, chunks)), oracle.run(ids))


def test_sequences_of_a_mixed_batch_equal_the_reference(oracle: Oracle, ops: Ops) -> None:
    harness = Harness.load(oracle.path, ops, num_seqs=3)
    prompts = [random_tokens(harness.model.spec, count, seed=count) for count in (37, 110, 90)]
    states = [harness.run([(0, 0, prompts[0][:20]), (1, 0, prompts[1][:109])])]
    states.append(harness.run([(2, 0, prompts[2]), (1, 109, prompts[1][109:]), (0, 20, prompts[0][20:])]))
    whole = torch.cat([states[0][:20], states[1][91:]]), torch.cat([states[0][20:], states[1][90:91]]), states[1][:90]
    for state, prompt in zip(whole, prompts, strict=True):
        assert_agrees(harness.logits(state), oracle.run(prompt))


def test_the_reference_is_really_sparse(sparse_oracle: Oracle, exact: Ops) -> None:
    """Guards the tests above: beyond `topk` positions a dense model must give other logits."""
    harness = Harness.load(sparse_oracle.path, exact)
    indexer = harness.model.spec.indexer
    assert indexer is not None
    ids = random_tokens(harness.model.spec, LENGTH)
    dense = Harness.load(sparse_oracle.path, dataclasses.replace(exact, index_topk=lambda *_args, **_kwargs: None))
    error = (dense.logits(dense.run([(0, 0, ids)])) - sparse_oracle.run(ids).logits[:, :264]).abs().amax(1)
    assert error[: indexer.topk].max() < TOLERANCE
    assert error[indexer.topk :].median() > 0.1


@pytest.mark.parametrize("size", ["nano", "tiny"])
def test_swapped_rope_layout_of_the_indexer_is_noticed(size: str, request: pytest.FixtureRequest, exact: Ops) -> None:
    oracle = Oracle(request.getfixturevalue(f"{size}_dir"))
    swapped = dataclasses.replace(
        exact,
        index_topk=lambda *args, interleaved, **kwargs: exact.index_topk(*args, interleaved=not interleaved, **kwargs),
        write_index_keys=lambda *args, interleaved: exact.write_index_keys(*args, interleaved=not interleaved),
    )
    harness = Harness.load(oracle.path, swapped)
    ids = random_tokens(harness.model.spec, LENGTH)
    reference = oracle.run(ids)
    error = (harness.logits(harness.run([(0, 0, ids)])) - reference.logits[:, :264]).abs().amax(1)
    assert error.max() > 1.0
    with pytest.raises(AssertionError):
        assert_agrees(harness.logits(harness.run([(0, 0, ids)])), reference)


@pytest.fixture(scope="module")
def tiny_gpu_narrow(tiny_gpu_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-gpu that selects 64 positions, so that short texts already leave some out."""
    path = tmp_path_factory.mktemp("tiny-gpu-narrow")
    for file in ("model.safetensors", "tokenizer.json", "generation_config.json"):
        os.link(tiny_gpu_dir / file, path / file)
    config = json.loads((tiny_gpu_dir / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"index_topk": 64}))
    return path


def test_tiny_gpu_equals_the_reference(tiny_gpu_narrow: Path, exact: Ops) -> None:
    harness, oracle = Harness.load(tiny_gpu_narrow, exact), Oracle(tiny_gpu_narrow)
    ids = random_tokens(harness.model.spec, 150)
    assert_agrees(harness.logits(harness.in_chunks(ids, [100, 48, 1, 1])), oracle.run(ids))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_tiny_gpu_beyond_its_topk(tiny_gpu_dir: Path, numerics: str) -> None:
    ops = load_ops("cpu", numerics, "fp32")  # type: ignore[arg-type]
    harness, oracle = Harness.load(tiny_gpu_dir, ops, max_len=2400), Oracle(tiny_gpu_dir)
    ids = random_tokens(harness.model.spec, 2300)
    assert_agrees(harness.logits(harness.in_chunks(ids, [1024, 1024, 250, 1, 1])), oracle.run(ids))


def test_layers_are_announced_once_their_rows_are_stored(nano_dir: Path, exact: Ops) -> None:
    harness = Harness.load(nano_dir, exact)
    ids = random_tokens(harness.model.spec, 40)
    batch = harness.batch([(0, 0, ids)])
    stored: list[tuple[int, bool]] = []

    def on_layer(layer: int) -> None:
        planes = harness.store.layers[layer]
        assert planes.index is not None
        rows = [plane.flatten(0, 1)[batch.slots_N] for plane in (planes.latent, planes.index)]
        stored.append((layer, all(bool(row.isfinite().all()) for row in rows)))

    harness.model.forward(batch, harness.store, on_layer)
    assert stored == [(0, True), (1, True), (2, True)]
