"""Configurations of the small checkpoints that the repository generates; shapes and names are those of released models.

nano      unit tests                                  tiny-gpu  real head dims and a real top-k
tiny      references and clusters                     nano-v3, tiny-v3  the same without an indexer
bench     dense attention with real head dims, 35 M parameters, no MTP layer
"""

from __future__ import annotations

from typing import Any, Final

_COMMON: Final[dict[str, Any]] = {
    "n_shared_experts": 1,
    "moe_layer_freq": 1,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "initializer_range": 0.02,
    "use_cache": True,
    "rope_theta": 10000,
}
_SIZES: Final[dict[str, dict[str, Any]]] = {
    "nano": {
        "vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 3,
        "intermediate_size": 128, "moe_intermediate_size": 32,
        "num_attention_heads": 4, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
        "q_lora_rank": 32, "kv_lora_rank": 32,
        "index_n_heads": 4, "index_head_dim": 16, "index_topk": 16,
        "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 4, "topk_group": 2,
        "max_position_embeddings": 5120,
    },
    "tiny": {
        "vocab_size": 512, "hidden_size": 256, "num_hidden_layers": 4,
        "intermediate_size": 512, "moe_intermediate_size": 128,
        "num_attention_heads": 4, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "q_lora_rank": 128, "kv_lora_rank": 512,
        "index_n_heads": 8, "index_head_dim": 128, "index_topk": 64,
        "n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2,
        "max_position_embeddings": 5120,
    },
    "tiny-gpu": {
        "vocab_size": 1024, "hidden_size": 512, "num_hidden_layers": 4,
        "intermediate_size": 1024, "moe_intermediate_size": 256,
        "num_attention_heads": 16, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "q_lora_rank": 256, "kv_lora_rank": 512,
        "index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048,
        "n_routed_experts": 32, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4,
        "max_position_embeddings": 163840,
    },
    "bench": {
        "vocab_size": 4096, "hidden_size": 512, "num_hidden_layers": 4,
        "intermediate_size": 1024, "moe_intermediate_size": 256,
        "num_attention_heads": 8, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "q_lora_rank": 256, "kv_lora_rank": 512,
        "n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2,
        "max_position_embeddings": 5120, "num_nextn_predict_layers": 0,
    },
}  # fmt: skip
_YARN_FACTOR: Final = 40
_YARN: Final = {
    "type": "yarn", "factor": _YARN_FACTOR, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
SIZES: Final = ("nano", "tiny", "tiny-gpu", "nano-v3", "tiny-v3", "bench")


def size_config(size: str) -> dict[str, Any]:
    """The `config.json` of a size, in the style of the released checkpoints. Raises KeyError on an unknown size."""
    base, _, variant = size.partition("-v3")
    if variant or size not in SIZES:
        raise KeyError(size)
    shape = dict(_SIZES[base])
    if base != size:
        shape = {key: value for key, value in shape.items() if not key.startswith("index_")}
    sparse = "index_topk" in shape
    return {
        "architectures": ["DeepseekV32ForCausalLM" if sparse else "DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v32" if sparse else "deepseek_v3",
        **_COMMON,
        **shape,
        "num_key_value_heads": shape["num_attention_heads"],
        "rope_scaling": _YARN | {"original_max_position_embeddings": shape["max_position_embeddings"] // _YARN_FACTOR},
    }
