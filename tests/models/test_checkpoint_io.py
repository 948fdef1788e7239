"""Reading and writing checkpoints: fp8 blocks, scale spellings, shards, MTP copies, fingerprints, one-line errors."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from llm_engine.api.errors import ConfigError
from llm_engine.models.checkpoint import Weights, inspect_checkpoint
from llm_engine.models.spec import ModelSpec
from llm_engine.models.synthetic import make_checkpoint
from llm_engine.ops.fp8 import dequantise_blocks, quantise_blocks
from llm_engine.runtime.weights import load_weights

KV_A = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"


def load(path: Path, dtype: torch.dtype = torch.float32, *, with_mtp: bool = True) -> Weights:
    return load_weights(path, ModelSpec.from_dir(path), dtype, with_mtp=with_mtp)


def rewritten(source: Path, out: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of a checkpoint with its tensors changed."""
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    out.mkdir()
    save_file(tensors, out / "model.safetensors")
    (out / "config.json").write_text((source / "config.json").read_text())
    return out


def by_definition(values: Tensor, scale: Tensor, rows: int, columns: int) -> Tensor:
    """Element by element: the scale of row i, column j is that of block (i // rows, j // columns)."""
    i = torch.arange(values.shape[0])[:, None] // rows
    j = torch.arange(values.shape[1])[None] // columns
    return values.to(torch.float32) * scale[i, j]


@pytest.fixture(scope="module")
def fp8_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("tiny", tmp_path_factory.mktemp("fp8"), planted=False, fp8=True, dtype="bf16")


def test_fp8_weights_load_as_their_exact_values(fp8_dir: Path) -> None:
    stored, loaded = load_file(fp8_dir / "model.safetensors"), load(fp8_dir).tensors
    quantised = [name for name, tensor in stored.items() if tensor.dtype == torch.float8_e4m3fn]
    assert tuple(stored[KV_A].shape) == (576, 256)
    assert tuple(stored[KV_A + "_scale_inv"].shape) == (5, 2)  # the fifth block row is half a block
    for name in quantised:
        expected = by_definition(stored[name], stored[name + "_scale_inv"], 128, 128)
        assert torch.equal(loaded[name], expected), name
    plain = [name for name in loaded if name not in quantised]
    assert {name.split(".")[-2] for name in plain} >= {"weights_proj", "gate", "k_norm", "eh_proj", "lm_head"}
    assert all(torch.equal(loaded[name], stored[name].float()) for name in plain)


def test_fp8_weights_are_close_to_what_was_quantised(fp8_dir: Path, tiny_dir: Path) -> None:
    exact, loaded = load(tiny_dir).tensors, load(fp8_dir).tensors
    for name in (KV_A, "model.layers.2.mlp.experts.3.down_proj.weight"):
        error = (loaded[name] - exact[name]).abs()
        assert 0 < error.max() < 0.07 * exact[name].abs().max()


def test_fp8_weights_are_exact_in_bf16(fp8_dir: Path) -> None:
    """Powers of two as scales: three mantissa bits survive the cast."""
    assert torch.equal(load(fp8_dir, torch.bfloat16).tensors[KV_A].float(), load(fp8_dir).tensors[KV_A])


def as_bytes(scale: Tensor) -> Tensor:
    return (scale.log2() + 127).to(torch.uint8)


@pytest.mark.parametrize("suffix", ["_scale_inv", "_scale"])
@pytest.mark.parametrize(
    "spelling", [as_bytes, lambda scale: as_bytes(scale).view(torch.float8_e8m0fnu)], ids=["uint8", "e8m0"]
)
def test_other_spellings_of_scales(
    fp8_dir: Path, tmp_path: Path, suffix: str, spelling: Callable[[Tensor], Tensor]
) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("_scale_inv")]:
            tensors[name.removesuffix("_scale_inv") + suffix] = spelling(tensors.pop(name))

    loaded, expected = load(rewritten(fp8_dir, tmp_path / "x", change)).tensors, load(fp8_dir).tensors
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_scales_that_are_no_powers_of_two(fp8_dir: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[KV_A + "_scale_inv"] *= 1.1

    path = rewritten(fp8_dir, tmp_path / "x", change)
    stored, loaded = load_file(path / "model.safetensors"), load(path)
    assert torch.equal(loaded.tensors[KV_A], by_definition(stored[KV_A], stored[KV_A + "_scale_inv"], 128, 128))
    assert loaded.fingerprint != load(fp8_dir).fingerprint


def test_the_block_size_comes_from_the_configuration(fp8_dir: Path, tmp_path: Path) -> None:
    """A 576-row tensor in blocks of 192 rows: a reader that goes by ratios of shapes would accept anything."""

    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("_scale_inv")]:
            weight = name.removesuffix("_scale_inv")
            original = by_definition(tensors[weight], tensors[name], 128, 128)
            tensors[weight], tensors[name] = quantise_blocks(original, (192, 64))

    path = rewritten(fp8_dir, tmp_path / "x", change)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [192, 64]
    with pytest.raises(ConfigError, match=r"scale grid \(\d+, \d+\), expected"):
        load(path)
    (path / "config.json").write_text(json.dumps(config))
    stored = load_file(path / "model.safetensors")
    assert torch.equal(load(path).tensors[KV_A], by_definition(stored[KV_A], stored[KV_A + "_scale_inv"], 192, 64))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 70), columns=st.integers(1, 70), block=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    magnitude=st.floats(-20, 20), power_of_two=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_quantisation_errs_by_half_a_step_at_most(
    rows: int, columns: int, block: tuple[int, int], magnitude: float, power_of_two: bool, seed: int
) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 2.0**magnitude
    values, scale = quantise_blocks(weight, block, power_of_two=power_of_two)
    assert not values.float().isnan().any()
    assert tuple(scale.shape) == (math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    assert not power_of_two or scale.log2().eq(scale.log2().round()).all()
    restored = dequantise_blocks(values, scale, block)
    step = by_definition(torch.ones(rows, columns), scale, *block)
    # e4m3: three mantissa bits (half a step is 2⁻⁴ of the value), smallest subnormal 2⁻⁹.
    assert ((restored - weight).abs() <= torch.maximum(weight.abs() * 2.0**-4, step * 2.0**-10) * 1.0001).all()


def test_shards_hold_the_same_model(tiny_dir: Path, tmp_path: Path) -> None:
    path = make_checkpoint("tiny", tmp_path, planted=False, shard_bytes=8 << 20)
    assert len(list(path.glob("model-*.safetensors"))) > 3
    whole, sharded = load(tiny_dir), load(path)
    assert sharded.fingerprint == whole.fingerprint
    assert all(torch.equal(sharded.tensors[name], whole.tensors[name]) for name in whole.tensors)


def test_fingerprint_follows_the_content(nano_dir: Path, tmp_path: Path) -> None:
    def nudge(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.2.mlp.experts.7.up_proj.weight"][3, 5] += 1e-6

    fingerprint = load(nano_dir).fingerprint
    assert load(make_checkpoint("nano", tmp_path / "a", planted=False)).fingerprint == fingerprint
    assert load(nano_dir, torch.bfloat16).fingerprint == fingerprint  # of what is stored, not of what it becomes
    assert load(rewritten(nano_dir, tmp_path / "b", nudge)).fingerprint != fingerprint
    assert load(make_checkpoint("nano", tmp_path / "c", planted=False, seed=1)).fingerprint != fingerprint
    assert load(make_checkpoint("nano", tmp_path / "d", planted=False, dtype="bf16")).fingerprint != fingerprint


def test_what_is_computed_in_fp32_stays_fp32(tiny_dir: Path) -> None:
    tensors = load(tiny_dir, torch.bfloat16).tensors
    kept = {name.split(".")[-2] for name, tensor in tensors.items() if tensor.dtype == torch.float32}
    assert kept == {
        "norm", "input_layernorm", "post_attention_layernorm", "q_a_layernorm", "kv_a_layernorm", "k_norm",
        "weights_proj", "gate", "enorm", "hnorm",
    }  # fmt: skip


COPIES = ("model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight")


def test_mtp_copies_are_shared_or_may_be_absent(nano_dir: Path, tmp_path: Path) -> None:
    def drop(tensors: dict[str, Tensor]) -> None:
        for name in COPIES:
            del tensors[name]

    whole, without = load(nano_dir), load(rewritten(nano_dir, tmp_path / "x", drop))
    assert not any(name in whole.tensors for name in COPIES)
    assert without.fingerprint == whole.fingerprint


def test_an_mtp_copy_that_differs_is_kept_with_a_warning(
    nano_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[COPIES[1]][0, 0] += 1.0

    with caplog.at_level(logging.WARNING):
        tensors = load(rewritten(nano_dir, tmp_path / "x", change)).tensors
    assert COPIES[1] in tensors
    assert COPIES[0] not in tensors
    assert COPIES[1] in caplog.text


def test_the_draft_layer_can_be_left_out(nano_dir: Path) -> None:
    weights = load(nano_dir, with_mtp=False)
    assert not weights.has_mtp
    assert not any(name.startswith("model.layers.3.") for name in weights.tensors)


def remove_experts(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if "experts.5." in name and "shared" not in name]:
        del tensors[name]


def add_static_scale(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.self_attn.o_proj.input_scale"] = torch.ones(1)


def cut_rows(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:300].clone()


def to_int8(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)


def to_fp8(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove_experts, r"model\.layers\.1\.mlp\.experts\.5\.gate_proj\.weight.* and 5 more missing"),
        (add_static_scale, r"model\.layers\.0\.self_attn\.o_proj\.input_scale unknown"),
        (cut_rows, r"wrong shape: lm_head\.weight \(300, 64\) not \(320, 64\)"),
        (to_int8, r"unsupported format: lm_head\.weight I8"),
        (to_fp8, r"lm_head\.weight is fp8 but its _scale_inv tensor is missing"),
    ],
)
def test_wrong_tensors_are_named_in_one_line(
    nano_dir: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    path = rewritten(nano_dir, tmp_path / "x", change)
    with pytest.raises(ConfigError, match=message) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_layers_beyond_the_model_are_ignored(nano_dir: Path, tmp_path: Path) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.4.mlp.gate.weight"] = torch.ones(2, 2)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    assert load(rewritten(nano_dir, tmp_path / "x", add)).fingerprint == load(nano_dir).fingerprint


def test_missing_and_broken_files_are_named(nano_dir: Path, tmp_path: Path) -> None:
    sharded = make_checkpoint("nano", tmp_path / "a", shard_bytes=300_000)
    second = sorted(sharded.glob("model-*.safetensors"))[1]
    content = second.read_bytes()
    second.write_bytes(content[: len(content) // 2])
    with pytest.raises(ConfigError, match=f"{second.name}: not a readable safetensors file"):
        load(sharded)
    second.unlink()
    with pytest.raises(ConfigError, match=f"{second.name}: listed in .* but missing"):
        load(sharded)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.json").write_text((nano_dir / "config.json").read_text())
    with pytest.raises(ConfigError, match=r"no \*\.safetensors file"):
        load(tmp_path / "b")


def test_inspect_counts_from_headers(fp8_dir: Path, nano_v3_dir: Path) -> None:
    report = inspect_checkpoint(fp8_dir)
    assert json.loads(json.dumps(report)) == report
    unique = load(fp8_dir).tensors
    mtp = sum(tensor.numel() for name, tensor in unique.items() if name.startswith("model.layers.4."))
    assert report["mtp_parameters"] == mtp
    assert report["parameters"] + mtp == sum(tensor.numel() for tensor in unique.values())
    assert report["elements_by_dtype"]["F8_E4M3"] > report["elements_by_dtype"]["BF16"]
    assert (report["attention"], report["index_topk"], report["fp8_block"]) == ("sparse", 64, [128, 128])
    assert report["missing"] == []
    assert inspect_checkpoint(nano_v3_dir)["attention"] == "dense"
