"""What a checkpoint's `config.json` says, checked once and frozen.

One spec serves the family: without `index_*` keys (V3, V3.1, R1) attention is dense; with them (V3.2) every layer has a
lightning indexer. Keys that are not understood are kept in `ModelSpec.config` and otherwise ignored.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm_engine.api.errors import ConfigError
from llm_engine.models.config_keys import ConfigKeys, read_json
from llm_engine.models.quantisation import fp8_block_size

ARCHITECTURES = ("DeepseekV32ForCausalLM", "DeepseekV3ForCausalLM")
_INDEX_KEYS = ("index_n_heads", "index_head_dim", "index_topk")
_COSMETIC = {"architecture", "num_tokens", "bos_id", "eos_ids", "stored_dtype", "fp8_block", "config", "max_position"}
_SHARED_TOPK_KEYS = ("index_topk_freq", "index_topk_pattern", "index_skip_topk_offset", "indexer_types")


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnSpec:
    """YaRN scaling of the rotary frequencies; active at every length, also below `original_max_position`."""

    factor: float
    original_max_position: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary embedding of the `dim` rotated channels of a head."""

    dim: int
    theta: float
    yarn: YarnSpec | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexerSpec:
    """Lightning indexer. Its heads hold the rotated channels first, in half-split layout unless `rope_interleave`."""

    num_heads: int
    head_dim: int
    topk: int
    rope_interleave: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeSpec:
    """Routed experts with sigmoid scores, a selection-only bias and group-limited top-k (`noaux_tc`)."""

    num_experts: int
    num_shared: int
    top_k: int
    num_groups: int
    top_groups: int
    norm_topk: bool
    scaling: float
    intermediate: int
    first_dense: int
    layer_freq: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Shapes and constants of one model.

    `num_tokens` is the tokenizer's size; ids from there up to `vocab_size` are padding and are never generated.
    """

    architecture: str
    vocab_size: int
    num_tokens: int
    hidden_size: int
    num_layers: int
    num_mtp_layers: int
    dense_intermediate: int
    num_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    nope_dim: int
    v_dim: int
    rope: RopeSpec
    indexer: IndexerSpec | None
    moe: MoeSpec
    rms_norm_eps: float
    max_position: int
    bos_id: int
    eos_ids: tuple[int, ...]
    stored_dtype: str
    fp8_block: tuple[int, int] | None  # None: weights are not block-quantised
    config: Mapping[str, Any] = field(repr=False, compare=False)

    @classmethod
    def from_dir(cls, path: Path) -> ModelSpec:
        """Read `config.json`, and the tokenizer's size and the end ids where those files exist. Raises ConfigError."""
        spec = cls.from_config(read_json(path / "config.json"), where=str(path / "config.json"))
        eos = _generation_eos(path)
        return dataclasses.replace(
            spec,
            num_tokens=_tokenizer_size(path, spec.vocab_size),
            eos_ids=tuple(dict.fromkeys((*spec.eos_ids, *eos))),
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str = "config.json") -> ModelSpec:
        """Check a parsed `config.json`. Raises ConfigError naming the first key that is missing or impossible."""
        keys = ConfigKeys(config, where)
        keys.choice("hidden_act", ("silu",), "silu")
        keys.choice("attention_bias", (False,), False)
        keys.choice("tie_word_embeddings", (False,), False)
        num_layers = keys.integer("num_hidden_layers")
        keys.choice("num_nextn_predict_layers", (0, 1), 0)
        vocab_size = keys.integer("vocab_size")
        return cls(
            architecture=_architecture(keys, config),
            vocab_size=vocab_size,
            num_tokens=vocab_size,
            hidden_size=keys.integer("hidden_size"),
            num_layers=num_layers,
            num_mtp_layers=keys.integer("num_nextn_predict_layers", 0, least=0),
            dense_intermediate=keys.integer("intermediate_size"),
            num_heads=keys.integer("num_attention_heads"),
            q_lora_rank=keys.integer("q_lora_rank"),
            kv_lora_rank=keys.integer("kv_lora_rank"),
            nope_dim=keys.integer("qk_nope_head_dim"),
            v_dim=keys.integer("v_head_dim"),
            rope=_rope(keys),
            indexer=_indexer(keys, config),
            moe=_moe(keys, num_layers),
            rms_norm_eps=keys.number("rms_norm_eps"),
            max_position=keys.integer("max_position_embeddings"),
            bos_id=keys.integer("bos_token_id", 0, least=0),
            eos_ids=_token_ids(keys, config, "eos_token_id"),
            stored_dtype=keys.text("torch_dtype", config.get("dtype") or "bfloat16"),
            fp8_block=fp8_block_size(keys),
            config=dict(config),
        )

    @property
    def qk_dim(self) -> int:
        """Channels of one query head: plain ‖ rotated."""
        return self.nope_dim + self.rope.dim

    @property
    def latent_dim(self) -> int:
        """Channels of one row of the latent cache: latent ‖ rotated key."""
        return self.kv_lora_rank + self.rope.dim

    @property
    def softmax_scale(self) -> float:
        """`qk_dim ** -0.5`, times the square of YaRN's `mscale_all_dim` factor."""
        yarn = self.rope.yarn
        mscale = 1.0 if yarn is None else yarn_mscale(yarn.factor, yarn.mscale_all_dim)
        return mscale**2 / math.sqrt(self.qk_dim)

    def is_moe(self, layer: int) -> bool:
        """Whether a layer has routed experts; the MTP layer counts as layer `num_layers`."""
        return layer >= self.moe.first_dense and layer % self.moe.layer_freq == 0

    def digest(self) -> str:
        """Hash of everything here that changes computed values: two specs with one digest compute the same function."""
        values = [(f.name, getattr(self, f.name)) for f in dataclasses.fields(self) if f.name not in _COSMETIC]
        return hashlib.blake2b(repr(values).encode(), digest_size=8).hexdigest()


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's magnitude correction: `0.1 · mscale · ln(factor) + 1`, and 1 without extension."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _architecture(keys: ConfigKeys, config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or names[0] not in ARCHITECTURES:
        raise keys.error("architectures", names, f"one of {', '.join(ARCHITECTURES)}")
    return str(names[0])


def _rope(keys: ConfigKeys) -> RopeSpec:
    """Both spellings: `rope_theta` + `rope_scaling`, or one `rope_parameters` object."""
    dim = keys.integer("qk_rope_head_dim", least=2)
    if dim % 2:
        raise keys.error("qk_rope_head_dim", dim, "an even number")
    merged = keys.section("rope_parameters")
    theta = (merged if merged is not None and "rope_theta" in merged else keys).number("rope_theta", least=1.0)
    scaling = merged if merged is not None else keys.section("rope_scaling")
    if scaling is None:
        return RopeSpec(dim=dim, theta=theta)
    kind = scaling.text("rope_type", scaling.text("type", "default"))
    if kind == "default":
        return RopeSpec(dim=dim, theta=theta)
    if kind != "yarn":
        raise scaling.error("rope_type" if "rope_type" in scaling else "type", kind, '"yarn" or "default"')
    yarn = YarnSpec(
        factor=scaling.number("factor", least=1.0),
        original_max_position=scaling.integer("original_max_position_embeddings"),
        beta_fast=scaling.number("beta_fast", 32.0),
        beta_slow=scaling.number("beta_slow", 1.0),
        mscale=scaling.number("mscale", 1.0),
        mscale_all_dim=scaling.number("mscale_all_dim", 0.0),
    )
    return RopeSpec(dim=dim, theta=theta, yarn=yarn)


def _indexer(keys: ConfigKeys, config: Mapping[str, Any]) -> IndexerSpec | None:
    if config["architectures"] == ["DeepseekV3ForCausalLM"] and not any(key in keys for key in _INDEX_KEYS):
        return None
    for key in _SHARED_TOPK_KEYS:
        if key in keys:
            raise keys.error(key, config[key], "no such key: layers that share their selection are not supported")
    spec = IndexerSpec(
        num_heads=keys.integer("index_n_heads"),
        head_dim=keys.integer("index_head_dim"),
        topk=keys.integer("index_topk"),
        rope_interleave=keys.boolean("indexer_rope_interleave", False),
    )
    if spec.head_dim < keys.integer("qk_rope_head_dim"):
        raise keys.error("index_head_dim", spec.head_dim, "at least qk_rope_head_dim")
    return spec


def _moe(keys: ConfigKeys, num_layers: int) -> MoeSpec:
    keys.choice("scoring_func", ("sigmoid",), "sigmoid")
    keys.choice("topk_method", ("noaux_tc",), "noaux_tc")  # the loader insists on the bias that this method needs
    spec = MoeSpec(
        num_experts=keys.integer("n_routed_experts"),
        num_shared=keys.integer("n_shared_experts", 0, least=0),
        top_k=keys.integer("num_experts_per_tok"),
        num_groups=keys.integer("n_group"),
        top_groups=keys.integer("topk_group"),
        norm_topk=keys.boolean("norm_topk_prob"),
        scaling=keys.number("routed_scaling_factor"),
        intermediate=keys.integer("moe_intermediate_size"),
        first_dense=keys.integer("first_k_dense_replace", 0, least=0),
        layer_freq=keys.integer("moe_layer_freq", 1),
    )
    if spec.num_experts % spec.num_groups or spec.num_experts // spec.num_groups < 2:
        raise keys.error("n_group", spec.num_groups, f"groups of 2 or more of n_routed_experts={spec.num_experts}")
    if spec.top_groups > spec.num_groups:
        raise keys.error("topk_group", spec.top_groups, f"at most n_group={spec.num_groups}")
    if spec.top_k > spec.top_groups * (spec.num_experts // spec.num_groups):
        raise keys.error("num_experts_per_tok", spec.top_k, "no more experts than the kept groups hold")
    return spec


def _token_ids(keys: ConfigKeys, config: Mapping[str, Any], key: str) -> tuple[int, ...]:
    value = config.get(key)
    ids = value if isinstance(value, list) else [value]
    if not ids or not all(isinstance(item, int) and not isinstance(item, bool) for item in ids):
        raise keys.error(key, value, "a token id or a list of them")
    return tuple(ids)


def _generation_eos(path: Path) -> tuple[int, ...]:
    file = path / "generation_config.json"
    if not file.exists():
        return ()
    tree = read_json(file)
    return _token_ids(ConfigKeys(tree, str(file)), tree, "eos_token_id") if "eos_token_id" in tree else ()


def _tokenizer_size(path: Path, vocab_size: int) -> int:
    """One past the largest id that `tokenizer.json` knows; the whole vocabulary when there is no tokenizer."""
    file = path / "tokenizer.json"
    if not file.exists():
        return vocab_size
    tree = read_json(file)
    try:
        ids = [*tree["model"]["vocab"].values(), *(token["id"] for token in tree.get("added_tokens", ()))]
        size: int = max(ids) + 1
    except (KeyError, TypeError, AttributeError, ValueError) as exc:
        raise ConfigError(f"{file}: no vocabulary of a byte-level BPE found") from exc
    if size > vocab_size:
        raise ConfigError(f"{file}: holds {size} tokens, more than vocab_size={vocab_size} of config.json")
    return size
