"""The engine benchmark: its floors, its slice, and a run at the size of a test model."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import engine
from benchmarks.engine_floor import Card, decode_bytes, prefill_seconds, target_ms
from benchmarks.engine_run import BLOCK_TOKENS, Point, Sequences, best
from benchmarks.engine_slice import DrawnTensors, SliceCaches, drawn_weights, routed, slice_spec
from benchmarks.engine_worker import DecodingWorker
from llm_engine.models.deepseek_v32 import build_model
from llm_engine.models.sizes import size_config
from llm_engine.models.spec import ModelSpec
from llm_engine.ops import GateConfig, Ops, load_ops
from llm_engine.runtime.batch import SequenceRows, build_batch

NANO = ModelSpec.from_config(size_config("nano"))


@pytest.fixture(scope="module")
def ops() -> Ops:
    return load_ops("cpu", "fast", "bf16")


@pytest.mark.parametrize(
    ("batch", "context", "milliseconds"),
    [(1, 1024, 1.56), (1, 65536, 1.58), (16, 8192, 8.4), (64, 4096, 17.3), (128, 2048, 19.5)],
)
def test_floor_of_eight_layers(batch: int, context: int, milliseconds: float) -> None:
    floor = decode_bytes(slice_spec(8), batch, context) / Card().bytes_per_s * 1e3
    assert floor == pytest.approx(milliseconds, rel=0.02)


def test_floor_of_a_long_prefill() -> None:
    assert prefill_seconds(slice_spec(8), Card(), 1, 65536) == pytest.approx(1.06, rel=0.02)


def test_drafts_wake_more_experts() -> None:
    spec = slice_spec(8)
    assert decode_bytes(spec, 1, 1024, 4) > 1.5 * decode_bytes(spec, 1, 1024)


def test_drawn_tensors_are_the_same_every_time(ops: Ops) -> None:
    tensors = DrawnTensors(NANO, ops, with_mtp=True)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    assert torch.equal(tensors[name], tensors[name])
    assert tensors[name].dtype == torch.bfloat16
    assert tensors["model.layers.1.mlp.gate.weight"].dtype == torch.float32
    assert set(tensors["model.norm.weight"].tolist()) == {1.0}


def test_pages_have_the_real_formats(ops: Ops) -> None:
    caches = SliceCaches.allocate(slice_spec(1), ops, 2, 64, fp8=True, mtp=False)
    assert caches.layers[0].latent.shape == (2, 64, 656)
    assert caches.layers[0].index is not None
    assert caches.layers[0].index.shape == (2, 64, 132)
    assert caches.mtp is None


def test_routing_is_spread_or_follows_the_trace(ops: Ops) -> None:
    config = GateConfig(top_k=2, num_groups=4, top_groups=2)
    logits, bias = torch.zeros(64, 8), torch.zeros(8)
    logits[:, 5] = 9.0  # what the model itself would choose
    ids, _ = routed(ops, NANO, 64, None).gate(logits, bias, config)
    assert max(Counter(ids.flatten().tolist()).values()) < 40
    ids, weights = routed(ops, NANO, 64, torch.tensor([[1, 6], [2, 3]])).gate(logits, bias, config)
    assert {tuple(sorted(row)) for row in ids.tolist()} == {(1, 6), (2, 3)}
    assert torch.allclose(weights, torch.full_like(weights, 0.5))


@pytest.mark.parametrize("mtp", [0, 2])
def test_measures_prefill_and_decode(ops: Ops, mtp: int) -> None:
    """Two points over one set of weights."""
    points = [Point(batch=batch, context=40, mtp=mtp, steps=2, chunk=50) for batch in (3, 1)]
    results = list(engine.measure(NANO, ops, points, engine.Options(fp8=False), Card()))
    assert [result["batch"] for result in results] == [3, 1]
    for result in results:
        assert result["prefill_s"] > 0
        accepted = 1 + sum(0.85**k for k in range(1, mtp + 1))
        assert result["tpot_ms"] == pytest.approx(result["step_ms"] / accepted, rel=0.01)
        assert result["step_over_floor"] > 1
        assert result["device_ms"] > 0
        assert result["host_ms"] > 0
        assert result["caches_gb"] >= 0
    assert json.loads(json.dumps(results)) == results


@pytest.mark.parametrize("mtp", [0, 2])
def test_every_step_takes_the_tokens_of_the_one_before(ops: Ops, mtp: int) -> None:
    """Steps that feed each other on the device give what passes over the same tokens give, one at a time."""
    point = Point(batch=2, context=40, mtp=mtp, steps=2, chunk=80)
    with torch.inference_mode():
        model = build_model(NANO, drawn_weights(NANO, ops, with_mtp=mtp > 0), ops, point.longest)
        chained, single = (Sequences(model, ops, point, fp8=False) for _ in range(2))
        chained.prefill()
        single.prefill()
        step, fed = chained.record(), []
        for sequences in (chained, single):
            sequences._tokens_SK.zero_()
        for number in range(3):
            fed.append(chained._tokens_SK.clone())
            tokens = step(number).clone()
            start = 40 + number * point.rows_per_seq
            rows = [SequenceRows(fed[-1][seq].tolist(), start, single._tables[seq]) for seq in range(point.batch)]
            hidden = model.forward(build_batch(rows, block_tokens=BLOCK_TOKENS, row_tile=1), single.caches)
            assert tokens.tolist() == model.logits(hidden).argmax(-1).tolist()
            assert chained._tokens_SK[:, 0].tolist() == tokens.view(point.batch, -1)[:, -1].tolist()


def test_best_is_the_largest() -> None:
    torch.manual_seed(0)
    for vocab in (129280, 640, 97):
        logits = torch.randn(3, vocab)
        assert best(logits).tolist() == logits.argmax(-1).tolist()


def test_sequences_are_prefilled_whole(ops: Ops) -> None:
    """Chunks of 50 rows over three prompts of 40: the caches equal those of a pass over everything."""
    with torch.inference_mode():
        points = [Point(batch=3, context=40, steps=2, chunk=chunk) for chunk in (50, 120)]
        model = build_model(NANO, drawn_weights(NANO, ops, with_mtp=False), ops, points[0].longest)
        runs = [Sequences(model, ops, point, fp8=False) for point in points]
        for run in runs:
            run.prefill()
        planes = [torch.stack([layer.latent for layer in run.caches.layers[:1]]) for run in runs]
    torch.testing.assert_close(*planes, atol=2e-2, rtol=2e-2)
    written = planes[0].abs().amax(-1).flatten() > 0
    assert int(written.sum()) == 3 * 40


def test_a_point_is_sequences_by_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        engine.main(["--point", "16"])
    assert "16x8192" in capsys.readouterr().err


def test_targets_belong_to_eight_layers() -> None:
    assert target_ms(slice_spec(8), 64, 4096) == 18.5
    assert target_ms(slice_spec(8), 64, 4097) is None
    assert target_ms(slice_spec(9), 64, 4096) is None


def test_a_trace_needs_its_routing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "trace.npy", np.zeros((4, 8), np.int64))
    for words in (["--routing", "trace"], ["--trace", str(tmp_path / "trace.npy")]):
        with pytest.raises(SystemExit):
            engine.main(words)
        assert "go together" in capsys.readouterr().err


@pytest.mark.parametrize("mtp", [0, 3])
def test_a_worker_decodes(ops: Ops, mtp: int) -> None:
    """The engine of a decode worker on its step thread; most drafts are right, some are wrong."""
    points = [Point(batch=3, context=70, mtp=mtp, steps=6, chunk=50)]
    (result,) = engine.measure(NANO, ops, points, engine.Options(fp8=False), Card(), on_worker=True)
    assert (result["batch"], result["mtp"], result["through"]) == (3, mtp, "worker")
    assert 0 < result["device_ms"] < result["step_ms"]
    assert 0 < result["host_overhead"] < 1
    assert set(result["host_ms"]) == {"plan", "build", "launch", "commit", "rest"}
    assert all(spent >= 0 for spent in result["host_ms"].values())
    assert result["gap_ms"] >= 0
    assert 1 <= result["tokens_per_step"] <= 1 + mtp
    assert (result["tokens_per_step"] > 1.5) == (mtp > 0)
    assert json.loads(json.dumps(result)) == result


def test_a_worker_that_launches_ahead_draws_the_same(ops: Ops) -> None:
    """And every pass is launched once, so that the tokens of a step come from one pass each."""
    point = Point(batch=2, context=40, mtp=2, steps=4, chunk=50)
    outputs = []
    for ahead in (False, True):
        with torch.inference_mode():
            model = build_model(NANO, drawn_weights(NANO, ops, with_mtp=True), ops, 256)
        worker = DecodingWorker(model, ops, point, fp8=False, ahead=ahead)
        outputs.append([worker.engine.step() for _ in range(4)])
        assert worker.engine.under_way == ahead
    drawn = [[[d.tokens for ds in result.deltas.values() for d in ds] for result in run if result] for run in outputs]
    assert drawn[0] == drawn[1]
