"""Names, shapes and kinds of the tensors of an official checkpoint, and where they lie on disk.

`expected_tensors` is the one place that knows the names. Everything is listed per expert, as the files store it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from llm_engine.api.errors import ConfigError
from llm_engine.models.config_keys import read_json
from llm_engine.models.spec import ModelSpec
from llm_engine.ops.fp8 import Weight

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_ITEM_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
SCALE_SUFFIXES = ("_scale_inv", "_scale")  # after `.weight`; both multiply
EMBED = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
FINAL_NORM = "model.norm.weight"

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """`quantised`: stored as fp8 blocks in fp8 checkpoints. `exact`: kept in fp32 whatever the compute dtype is."""

    shape: Shape
    quantised: bool = False
    exact: bool = False


def expected_tensors(spec: ModelSpec, *, with_mtp: bool) -> dict[str, TensorInfo]:
    """Every tensor that a checkpoint of this model must hold, by name (MTP copies of embedding and head excluded)."""
    vocab = TensorInfo((spec.vocab_size, spec.hidden_size))
    names = {EMBED: vocab, HEAD: vocab, FINAL_NORM: TensorInfo((spec.hidden_size,), exact=True)}
    for layer in range(spec.num_layers + (spec.num_mtp_layers if with_mtp else 0)):
        prefix = layer_prefix(layer)
        names.update((prefix + name, info) for name, info in _layer(spec, layer))
    if with_mtp and spec.num_mtp_layers:
        prefix = layer_prefix(spec.num_layers)
        norm = TensorInfo((spec.hidden_size,), exact=True)
        names |= {prefix + name: norm for name in ("enorm.weight", "hnorm.weight", "shared_head.norm.weight")}
        names[prefix + "eh_proj.weight"] = TensorInfo((spec.hidden_size, 2 * spec.hidden_size))
    return names


def mtp_copies(spec: ModelSpec) -> dict[str, str]:
    """Optional MTP tensors that repeat a main tensor: copy's name → main name."""
    if not spec.num_mtp_layers:
        return {}
    prefix = layer_prefix(spec.num_layers)
    return {prefix + "embed_tokens.weight": EMBED, prefix + "shared_head.head.weight": HEAD}


def layer_prefix(layer: int) -> str:
    """The prefix of a layer's tensor names; the MTP layer is numbered after the main ones."""
    return f"model.layers.{layer}."


def is_ignorable(name: str, num_layers: int) -> bool:
    """Tensors that may be present and mean nothing here: frequency buffers, layers from `num_layers` on."""
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return name.endswith("rotary_emb.inv_freq") or (match is not None and int(match[1]) >= num_layers)


def _layer(spec: ModelSpec, layer: int) -> Iterator[tuple[str, TensorInfo]]:
    norm = TensorInfo((spec.hidden_size,), exact=True)
    yield "input_layernorm.weight", norm
    yield "post_attention_layernorm.weight", norm
    yield from _attention(spec)
    if spec.indexer is not None:
        yield from _indexer(spec, spec.indexer.num_heads, spec.indexer.head_dim)
    yield from _moe(spec) if spec.is_moe(layer) else _mlp(spec, "mlp.", spec.dense_intermediate)


def _linear(rows: int, columns: int) -> TensorInfo:
    return TensorInfo((rows, columns), quantised=True)


def _attention(spec: ModelSpec) -> Iterator[tuple[str, TensorInfo]]:
    prefix, heads = "self_attn.", spec.num_heads
    yield prefix + "q_a_proj.weight", _linear(spec.q_lora_rank, spec.hidden_size)
    yield prefix + "q_a_layernorm.weight", TensorInfo((spec.q_lora_rank,), exact=True)
    yield prefix + "q_b_proj.weight", _linear(heads * spec.qk_dim, spec.q_lora_rank)
    yield prefix + "kv_a_proj_with_mqa.weight", _linear(spec.latent_dim, spec.hidden_size)
    yield prefix + "kv_a_layernorm.weight", TensorInfo((spec.kv_lora_rank,), exact=True)
    yield prefix + "kv_b_proj.weight", _linear(heads * (spec.nope_dim + spec.v_dim), spec.kv_lora_rank)
    yield prefix + "o_proj.weight", _linear(spec.hidden_size, heads * spec.v_dim)


def _indexer(spec: ModelSpec, heads: int, dim: int) -> Iterator[tuple[str, TensorInfo]]:
    prefix = "self_attn.indexer."
    yield prefix + "wq_b.weight", _linear(heads * dim, spec.q_lora_rank)
    yield prefix + "wk.weight", _linear(dim, spec.hidden_size)
    yield prefix + "k_norm.weight", TensorInfo((dim,), exact=True)
    yield prefix + "k_norm.bias", TensorInfo((dim,), exact=True)
    yield prefix + "weights_proj.weight", TensorInfo((heads, spec.hidden_size), exact=True)


def _mlp(spec: ModelSpec, prefix: str, intermediate: int) -> Iterator[tuple[str, TensorInfo]]:
    yield prefix + "gate_proj.weight", _linear(intermediate, spec.hidden_size)
    yield prefix + "up_proj.weight", _linear(intermediate, spec.hidden_size)
    yield prefix + "down_proj.weight", _linear(spec.hidden_size, intermediate)


def _moe(spec: ModelSpec) -> Iterator[tuple[str, TensorInfo]]:
    moe = spec.moe
    yield "mlp.gate.weight", TensorInfo((moe.num_experts, spec.hidden_size), exact=True)
    yield "mlp.gate.e_score_correction_bias", TensorInfo((moe.num_experts,), exact=True)
    for expert in range(moe.num_experts):
        yield from _mlp(spec, f"mlp.experts.{expert}.", moe.intermediate)
    if moe.num_shared:
        yield from _mlp(spec, "mlp.shared_experts.", moe.num_shared * moe.intermediate)


@dataclass(frozen=True, slots=True)
class Weights:
    """Loaded weights by official name, in the dtypes of the compute path or kept in fp8 blocks.

    `fingerprint` identifies the stored values: equal for equal content, whatever the sharding of the files.
    """

    tensors: Mapping[str, Weight]
    fingerprint: str
    has_mtp: bool


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as found on disk; `dtype` is the safetensors name (F32, BF16, F8_E4M3, …)."""

    file: Path
    dtype: str
    shape: Shape

    @property
    def num_bytes(self) -> int:
        return _count(self.shape) * _ITEM_BYTES.get(self.dtype, 1)


def scan(path: Path) -> dict[str, StoredTensor]:
    """Headers of all tensors of a checkpoint directory, by name. Raises ConfigError on missing or broken files."""
    found: dict[str, StoredTensor] = {}
    for file in _shards(path):
        try:
            with safe_open(file, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118 - not a mapping
                    view = shard.get_slice(name)
                    found[name] = StoredTensor(file, view.get_dtype(), tuple(view.get_shape()))
        except (OSError, SafetensorError) as exc:
            raise ConfigError(f"{file}: not a readable safetensors file: {exc}") from exc
    return found


def _shards(path: Path) -> list[Path]:
    index = path / INDEX_FILE
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, Mapping):
            raise ConfigError(f"{index}: weight_map is missing")
        files = sorted({path / str(name) for name in weight_map.values()})
    else:
        files = [path / SINGLE_FILE] if (path / SINGLE_FILE).exists() else sorted(path.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{path}: no *.safetensors file; is this a checkpoint directory?")
    for file in files:
        if not file.is_file():
            raise ConfigError(f"{file}: listed in {INDEX_FILE} but missing; the download is incomplete")
    return files


def scale_name(name: str, stored: Mapping[str, StoredTensor]) -> str | None:
    """Name of the block scales that belong to a weight, or None."""
    return next((name + suffix for suffix in SCALE_SUFFIXES if name + suffix in stored), None)


def inspect_checkpoint(path: Path) -> dict[str, Any]:
    """A JSON-ready summary from headers alone: the model's shape, its parameters and bytes by dtype, its files."""
    spec = ModelSpec.from_dir(path)
    stored = scan(path)
    expected = expected_tensors(spec, with_mtp=True)
    by_dtype: dict[str, int] = {}
    for tensor in stored.values():
        by_dtype[tensor.dtype] = by_dtype.get(tensor.dtype, 0) + _count(tensor.shape)
    mtp = layer_prefix(spec.num_layers)
    sizes = {name: _count(info.shape) for name, info in expected.items()}
    return {
        "path": str(path),
        "architecture": spec.architecture,
        "attention": "sparse" if spec.indexer is not None else "dense",
        "index_topk": spec.indexer.topk if spec.indexer is not None else None,
        "layers": spec.num_layers,
        "mtp_layers": spec.num_mtp_layers,
        "hidden_size": spec.hidden_size,
        "heads": spec.num_heads,
        "experts": spec.moe.num_experts,
        "experts_per_token": spec.moe.top_k,
        "vocab_size": spec.vocab_size,
        "tokens": spec.num_tokens,
        "max_position": spec.max_position,
        "parameters": sum(size for name, size in sizes.items() if not name.startswith(mtp)),
        "mtp_parameters": sum(size for name, size in sizes.items() if name.startswith(mtp)),
        "fp8_block": list(spec.fp8_block) if spec.fp8_block else None,
        "elements_by_dtype": dict(sorted(by_dtype.items())),
        "files": sorted({tensor.file.name for tensor in stored.values()}),
        "bytes": sum(file.stat().st_size for file in {tensor.file for tensor in stored.values()}),
        "missing": sorted(set(expected) - set(stored)),
    }


def _count(shape: Shape) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
