"""config.json → ModelSpec: both spellings, the whole family, one-line errors that name the key."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, DeepseekV32Config
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32RotaryEmbedding

from llm_engine.api.errors import ConfigError
from llm_engine.models.rope import inverse_frequencies, rope_tables
from llm_engine.models.sizes import SIZES, size_config
from llm_engine.models.spec import ModelSpec, RopeSpec, YarnSpec

RELEASED: dict[str, Any] = {
    "architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32", "vocab_size": 129280,
    "hidden_size": 7168, "num_hidden_layers": 61, "num_nextn_predict_layers": 1, "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_routed_experts": 256, "n_shared_experts": 1,
    "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
    "norm_topk_prob": True, "routed_scaling_factor": 2.5, "num_attention_heads": 128, "num_key_value_heads": 128,
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048, "rope_theta": 10000,
    "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32,
                     "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
    "max_position_embeddings": 163840, "rms_norm_eps": 1e-6, "hidden_act": "silu", "attention_bias": False,
    "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1, "torch_dtype": "bfloat16",
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                            "weight_block_size": [128, 128], "scale_fmt": "ue8m0"},
}  # fmt: skip


def changed(**values: Any) -> dict[str, Any]:
    """The released configuration with some keys replaced; None removes a key."""
    merged = RELEASED | values
    return {key: value for key, value in merged.items() if value is not None}


def test_released_configuration() -> None:
    spec = ModelSpec.from_config(RELEASED)
    assert spec.softmax_scale == pytest.approx(0.1352337788608801, rel=1e-14)
    assert (spec.qk_dim, spec.latent_dim, spec.fp8_block) == (192, 576, (128, 128))
    assert [layer for layer in range(62) if not spec.is_moe(layer)] == [0, 1, 2]
    assert spec.indexer is not None
    assert spec.indexer.topk == 2048


def test_v3_has_no_indexer() -> None:
    config = {key: value for key, value in RELEASED.items() if not key.startswith("index_")}
    assert ModelSpec.from_config(config | {"architectures": ["DeepseekV3ForCausalLM"]}).indexer is None
    with pytest.raises(ConfigError, match="index_n_heads is missing"):
        ModelSpec.from_config(config)


def test_rope_parameters_spelling() -> None:
    scaling = {**RELEASED["rope_scaling"], "rope_type": "yarn", "rope_theta": 10000.0}
    del scaling["type"]
    merged = changed(rope_theta=None, rope_scaling=None, rope_parameters=scaling)
    assert ModelSpec.from_config(merged) == ModelSpec.from_config(RELEASED)


@pytest.mark.parametrize("size", SIZES)
def test_configurations_rewritten_by_transformers_mean_the_same(size: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(size_config(size)))
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    saved["architectures"] = size_config(size)["architectures"]  # only models write it
    assert "rope_parameters" in saved
    assert ModelSpec.from_config(saved).digest() == ModelSpec.from_config(size_config(size)).digest()


@pytest.mark.parametrize(
    "key",
    [
        "architectures", "hidden_size", "q_lora_rank", "kv_lora_rank", "n_group", "norm_topk_prob", "rope_theta",
        "eos_token_id", "index_topk", "rms_norm_eps",
    ],
)  # fmt: skip
def test_missing_keys_are_named(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^config.json: {key} is missing; expected "):
        ModelSpec.from_config(changed(**{key: None}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": "7168"}, "hidden_size is '7168'; expected an integer of at least 1"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"architectures": ["LlamaForCausalLM"]}, "architectures is .*; expected one of DeepseekV32ForCausalLM"),
        ({"scoring_func": "softmax"}, 'scoring_func is \'softmax\'; expected "sigmoid"'),
        ({"topk_method": "greedy"}, "topk_method is 'greedy'"),
        ({"attention_bias": True}, "attention_bias is True; expected false"),
        ({"num_nextn_predict_layers": 3}, "num_nextn_predict_layers is 3; expected 0 or 1"),
        ({"n_group": 7}, "n_group is 7"),
        ({"topk_group": 9}, "topk_group is 9"),
        ({"num_experts_per_tok": 200}, "num_experts_per_tok is 200"),
        ({"index_topk_freq": 2}, "index_topk_freq is 2"),
        ({"qk_rope_head_dim": 63}, "qk_rope_head_dim is 63; expected an even number"),
        ({"index_head_dim": 32}, "index_head_dim is 32; expected at least qk_rope_head_dim"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling: type is 'linear'"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling: factor is missing"),
        ({"rope_scaling": 40}, "rope_scaling is 40; expected an object"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config: quant_method is 'awq'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "weight_block_size is missing"),
    ],
)  # fmt: skip
def test_impossible_values_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        ModelSpec.from_config(changed(**values))
    assert "\n" not in str(caught.value)


def compressed(**weights: Any) -> dict[str, Any]:
    merged = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 64]} | weights
    groups = {"group_0": {"targets": ["Linear"], "weights": merged}}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups}


def test_compressed_tensors_with_fp8_blocks() -> None:
    assert ModelSpec.from_config(changed(quantization_config=compressed())).fp8_block == (128, 64)
    for weights, key in (
        ({"type": "int"}, "type"),
        ({"strategy": "channel"}, "strategy"),
        ({"num_bits": 4}, "num_bits"),
    ):
        with pytest.raises(ConfigError, match=f"quantization_config: config_groups: group_0: weights: {key} is "):
            ModelSpec.from_config(changed(quantization_config=compressed(**weights)))


@pytest.mark.parametrize("text", ["", "[]", "{", "\xff"])
def test_broken_files_are_named(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        ModelSpec.from_dir(tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"config\.json"):
        ModelSpec.from_dir(tmp_path)


def test_tokenizer_and_generation_config_add_to_the_spec(nano_dir: Path, tmp_path: Path) -> None:
    assert ModelSpec.from_dir(nano_dir).num_tokens == 264
    (tmp_path / "config.json").write_text(json.dumps(size_config("nano")))
    assert ModelSpec.from_dir(tmp_path).num_tokens == 320
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
    assert ModelSpec.from_dir(tmp_path).eos_ids == (1, 7)


def test_digest_follows_what_is_computed() -> None:
    base = ModelSpec.from_config(RELEASED).digest()
    assert ModelSpec.from_config(changed(eos_token_id=2, torch_dtype="float32", my_note="x")).digest() == base
    for values in ({"index_topk": 1024}, {"rope_theta": 20000}, {"rms_norm_eps": 1e-5}, {"topk_group": 2}):
        assert ModelSpec.from_config(changed(**values)).digest() != base


@pytest.mark.parametrize("size", ["nano", "tiny", "tiny-gpu"])
def test_rope_tables_equal_the_reference(size: str) -> None:
    config = size_config(size)
    theirs = DeepseekV32RotaryEmbedding(DeepseekV32Config(**config))
    ours = ModelSpec.from_config(config).rope
    torch.testing.assert_close(inverse_frequencies(ours), theirs.inv_freq, rtol=0, atol=0)
    cos, sin = rope_tables(ours, 3000)
    cos_theirs, sin_theirs = theirs(torch.zeros(1), torch.arange(3000)[None])
    torch.testing.assert_close(cos, cos_theirs[0, :, : cos.shape[1]], rtol=0, atol=1e-7)
    torch.testing.assert_close(sin, sin_theirs[0, :, : sin.shape[1]], rtol=0, atol=1e-7)


def test_yarn_keeps_fast_pairs_and_stretches_slow_ones() -> None:
    """Correction dims of the released model: pairs up to 10 as they are, from 23 on divided by 40."""
    yarn = YarnSpec(factor=40.0, original_max_position=4096, mscale=2.0, mscale_all_dim=1.0)
    plain = inverse_frequencies(RopeSpec(dim=64, theta=10000.0))
    ratio = inverse_frequencies(RopeSpec(dim=64, theta=10000.0, yarn=yarn)) / plain
    assert ratio[:11].eq(1.0).all()
    assert ratio[10:24].diff().lt(0).all()
    torch.testing.assert_close(ratio[23:], torch.full((9,), 1 / 40))
    magnitude = (0.2 * math.log(40) + 1) / (0.1 * math.log(40) + 1)
    cos, sin = rope_tables(RopeSpec(dim=64, theta=10000.0, yarn=yarn), 10)
    torch.testing.assert_close((cos**2 + sin**2).sqrt(), torch.full_like(cos, magnitude))
