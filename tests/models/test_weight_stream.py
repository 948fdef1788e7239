"""Weights that come one by one while a model is built: the same values and fingerprint as all at once."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_engine.api.errors import ConfigError
from llm_engine.models.checkpoint import expected_tensors
from llm_engine.models.deepseek_v32 import build_model
from llm_engine.models.spec import ModelSpec
from llm_engine.models.synthetic import make_checkpoint
from llm_engine.ops import load_ops
from llm_engine.ops.fp8 import Fp8Blocks, in_full
from llm_engine.runtime import weights
from llm_engine.runtime.weights import WeightStream, load_weights

CPU = torch.device("cpu")


@pytest.fixture(params=["plain", "fp8", "shards", "copies differ"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "fp8":
        return make_checkpoint("tiny", tmp_path, fp8=True)
    shards = 1 << 18 if request.param == "shards" else None
    made = make_checkpoint("nano", tmp_path, planted=False, dtype="bf16", shard_bytes=shards)
    if request.param == "copies differ":
        tensors = load_file(made / "model.safetensors")
        tensors["model.layers.3.shared_head.head.weight"][0, 0] += 1.0
        save_file(tensors, made / "model.safetensors")
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_in_any_order(path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_AHEAD_BYTES", 20_000)
    spec = ModelSpec.from_dir(path)
    whole = load_weights(path, spec, dtype, progress=False)
    with WeightStream(path, spec, dtype, CPU, progress=False) as stream:
        assert set(stream) == set(whole.tensors)
        assert len(stream) == len(whole.tensors)
        names = [*stream, *random.Random(0).sample(list(stream), 5)]
        random.Random(1).shuffle(names)
        for name in names:
            assert name in stream
            assert stream[name].dtype == whole.tensors[name].dtype
            assert torch.equal(stream[name], whole.tensors[name]), name
        assert stream.get("model.embed_tokens.bias") is None
        assert stream.fingerprint() == whole.fingerprint
        assert stream.weights.has_mtp == whole.has_mtp


def test_blocks_that_a_table_packs_stay_blocks(tmp_path: Path) -> None:
    path = make_checkpoint("tiny", tmp_path, fp8=True)
    spec, infos = ModelSpec.from_dir(path), expected_tensors(ModelSpec.from_dir(path), with_mtp=True)
    stored, dequantised = load_file(path / "model.safetensors"), load_weights(path, spec, torch.bfloat16).tensors
    options: dict[str, Any] = {"fp8_block": (128, 128), "progress": False}
    whole = load_weights(path, spec, torch.bfloat16, **options)
    with WeightStream(path, spec, torch.bfloat16, CPU, **options) as stream:
        for name, info in infos.items():
            for weight in (stream[name], whole.tensors[name]):
                assert isinstance(weight, Fp8Blocks) == info.quantised, name
                assert torch.equal(in_full(weight), dequantised[name])
                if isinstance(weight, Fp8Blocks):
                    assert torch.equal(weight.values.view(torch.uint8), stored[name].view(torch.uint8))
                    assert torch.equal(weight.scales, stored[name + "_scale_inv"])
        assert stream.fingerprint() == whole.fingerprint
    others = load_weights(path, spec, torch.bfloat16, fp8_block=(64, 128), progress=False)
    assert all(isinstance(weight, torch.Tensor) for weight in others.tensors.values())


def test_a_model_is_built_in_the_order_that_is_read_ahead(nano_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise readers would wait with what nobody asks for, and every tensor would be waited for in full."""
    monkeypatch.setattr(weights, "_AHEAD_BYTES", 100_000)  # less than a layer
    spec, missed = ModelSpec.from_dir(nano_dir), []

    class Watched(WeightStream):
        def __getitem__(self, name: str) -> torch.Tensor:
            if name in self and name not in self._coming:
                missed.append(name)
            return super().__getitem__(name)

    with Watched(nano_dir, spec, torch.float32, CPU, progress=False) as stream:
        build_model(spec, stream.weights, load_ops("cpu"), 64)
        assert stream.fingerprint() == load_weights(nano_dir, spec, torch.float32, progress=False).fingerprint
    assert missed == [], missed


def test_without_the_draft_layer(nano_dir: Path) -> None:
    spec = ModelSpec.from_dir(nano_dir)
    with WeightStream(nano_dir, spec, torch.float32, CPU, with_mtp=False, progress=False) as stream:
        assert not any(name.startswith(f"model.layers.{spec.num_layers}.") for name in stream)
        whole = load_weights(nano_dir, spec, torch.float32, with_mtp=False, progress=False)
        assert stream.fingerprint() == whole.fingerprint


def test_scales_that_do_not_fit_are_an_error_of_one_line(tmp_path: Path) -> None:
    path = make_checkpoint("tiny", tmp_path, fp8=True)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [64, 128]
    (path / "config.json").write_text(json.dumps(config))
    spec = ModelSpec.from_dir(path)
    with (
        WeightStream(path, spec, torch.bfloat16, CPU, progress=False) as stream,
        pytest.raises(ConfigError, match=r"_scale_inv: scale grid .*, expected"),
    ):
        build_model(spec, stream.weights, load_ops("cpu", "exact", "bf16"), 64)
