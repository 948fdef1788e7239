"""Generates checkpoints of test size, byte for byte from a seed, under the official tensor names.

Random weights exercise the arithmetic but are chaotic: their next token says nothing about a bug. Planted weights are
for serving: the model's next token is a known function of the last one (`planted_successors`), disturbed by `noise`,
which is what the attention and MLP blocks add. Measured in fp32, greedy, 80 tokens:

                          nano: noise 0.3    2     3     4      tiny: noise 0.3    4     6
  equals the planted walk            100 %  94 %  65 %  30 %               100 %  100 %  75 %
  MTP draft accepted                 100 %  94 %  65 %  18 %               100 %  100 %  75 %
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from llm_engine.api.errors import ConfigError
from llm_engine.models import byte_tokenizer
from llm_engine.models.checkpoint import (
    EMBED,
    FINAL_NORM,
    HEAD,
    INDEX_FILE,
    SINGLE_FILE,
    TensorInfo,
    expected_tensors,
    mtp_copies,
)
from llm_engine.models.sizes import SIZES, size_config
from llm_engine.models.spec import ModelSpec
from llm_engine.ops.fp8 import quantise_blocks

_DTYPES = {"fp32": (torch.float32, "float32"), "bf16": (torch.bfloat16, "bfloat16")}
_FP8_BLOCK = (128, 128)
_SYNONYM = 0.9  # how much of a token outside the walk's cycle is the embedding of a token inside it
_MULTIBYTE = ("é", "中", "😀")

Make = Callable[[str, TensorInfo], Tensor]


def make_checkpoint(
    size: str,
    out_dir: Path,
    *,
    seed: int = 0,
    dtype: str = "fp32",
    fp8: bool = False,
    planted: bool = True,
    noise: float = 0.3,
    shard_bytes: int | None = None,
) -> Path:
    """Write a complete checkpoint (configuration, weights, tokenizer, chat files) into `out_dir` and return it.

    `dtype` fp32 or bf16; `fp8` stores linear weights as e4m3 blocks; `shard_bytes` splits the weights into files of
    about that size. Raises ConfigError on an unknown size or an impossible combination.
    """
    if size not in SIZES:
        raise ConfigError(f"size={size!r}: expected one of {', '.join(SIZES)}")
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype={dtype!r}: expected fp32 or bf16")
    config = size_config(size) | {"torch_dtype": _DTYPES[dtype][1]}
    if fp8:
        if config["hidden_size"] < _FP8_BLOCK[1]:
            raise ConfigError(f"size={size}: its dimensions are below one fp8 block of {_FP8_BLOCK[1]}; use tiny")
        config["quantization_config"] = {
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
            "weight_block_size": list(_FP8_BLOCK), "scale_fmt": "ue8m0",
        }  # fmt: skip
    spec = ModelSpec.from_config(config)
    out_dir.mkdir(parents=True, exist_ok=True)
    make = _planted(spec, seed, noise) if planted else _random(spec, seed)
    _write_weights(out_dir, dict(_stored(spec, make, _DTYPES[dtype][0], fp8)), shard_bytes)
    (out_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    byte_tokenizer.write_tokenizer(out_dir, spec.max_position)
    return out_dir


def planted_successors(seed: int) -> list[int]:
    """Next token of every token of the test tokenizer under planted weights without noise.

    The walk is one cycle over printable ASCII, newline, three multi-byte characters and the end token, so that greedy
    output is valid text. Every other token leads into the cycle at a character's first byte.
    """
    rng = random.Random(f"planted walk {seed}")
    texts = (*map(chr, range(0x20, 0x7F)), "\n", *_MULTIBYTE)
    units = [[byte_tokenizer.byte_id(byte) for byte in text.encode()] for text in texts]
    starts = [unit[0] for unit in units]
    units.append([1])  # the end token
    rng.shuffle(units)
    cycle = [token for unit in units for token in unit]
    after = dict(zip(cycle, [*cycle[1:], cycle[0]], strict=True))
    return [after[t] if t in after else rng.choice(starts) for t in range(byte_tokenizer.NUM_TOKENS)]


def _stored(spec: ModelSpec, make: Make, dtype: torch.dtype, fp8: bool) -> Iterator[tuple[str, Tensor]]:
    """Tensors as the official releases store them: linears quantised if asked, the selection bias always in fp32."""
    for name, info in expected_tensors(spec, with_mtp=True).items():
        weight = make(name, info)
        if fp8 and info.quantised:
            values, scale = quantise_blocks(weight, _FP8_BLOCK)
            yield name, values
            yield name + "_scale_inv", scale
        else:
            yield name, weight if name.endswith("e_score_correction_bias") else weight.to(dtype)
    for copy, original in mtp_copies(spec).items():
        # A clone, since safetensors refuses to write two names of one memory.
        yield copy, make(original, TensorInfo((spec.vocab_size, spec.hidden_size))).to(dtype).clone()


def _random(spec: ModelSpec, seed: int) -> Make:
    """Variance-preserving Gaussian weights; norms near one, biases small."""

    def make(name: str, info: TensorInfo) -> Tensor:
        noise = torch.randn(info.shape, generator=_generator(seed, name))
        if name == EMBED:
            return noise
        if spec.indexer is not None and name.endswith("indexer.wq_b.weight"):
            # Heads in opposite pairs. Otherwise the relu of a few heads is zero for many keys at once, and which of
            # many equal scores is selected is no longer a matter of arithmetic.
            heads = noise.view(spec.indexer.num_heads, -1)
            heads[1::2] = -heads[0::2]
        if len(info.shape) == 2:
            return noise / math.sqrt(info.shape[1])
        return 0.1 * noise if name.endswith("bias") else 1.0 + 0.1 * noise

    return make


def _planted(spec: ModelSpec, seed: int, noise: float) -> Make:
    """Random weights, except that embedding and head hold the walk, blocks add little to it and MTP passes it on."""
    base = _random(spec, seed)
    embed, head = _walk_embedding(spec, seed)
    width = spec.hidden_size
    # The residual stream has rms width ** -0.5 (unit embeddings); together the blocks add about `noise` times that.
    damping = noise / math.sqrt(2 * spec.num_layers * width)

    def make(name: str, info: TensorInfo) -> Tensor:
        if name == EMBED:
            return embed
        if name == HEAD:
            return head
        if name == FINAL_NORM or name.endswith(("enorm.weight", "hnorm.weight", "shared_head.norm.weight")):
            return torch.ones(info.shape)
        if name.endswith("eh_proj.weight"):
            small = base(name, info)[:, :width] * (0.05 / width**0.5)
            return torch.cat([torch.eye(width) / width**0.5, small], dim=1)
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            return base(name, info) * damping
        return base(name, info)

    return make


def _walk_embedding(spec: ModelSpec, seed: int) -> tuple[Tensor, Tensor]:
    """Embedding and head [V, H]: the head row of a token is the embedding of the token that leads to it."""
    directions = torch.randn(spec.vocab_size, spec.hidden_size, generator=_generator(seed, "walk"))
    embed = torch.nn.functional.normalize(directions, dim=1)
    head = torch.nn.functional.normalize(torch.randn(embed.shape, generator=_generator(seed, "head")), dim=1)
    after = planted_successors(seed)
    cycle = _cycle(after)
    before = {after[token]: token for token in cycle}
    for token, successor in enumerate(after):
        if token in cycle:
            head[successor] = embed[token]
        else:  # lean towards the cycle's token with the same successor
            embed[token] = _SYNONYM * embed[before[successor]] + math.sqrt(1 - _SYNONYM**2) * embed[token]
    return embed, head


def _cycle(after: list[int]) -> set[int]:
    cycle, token = set[int](), 1
    while token not in cycle:
        cycle.add(token)
        token = after[token]
    return cycle


def _write_weights(out_dir: Path, tensors: dict[str, Tensor], shard_bytes: int | None) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    used = 0
    for name, tensor in tensors.items():
        if shard_bytes is not None and shards[-1] and used + tensor.nbytes > shard_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = tensor.contiguous()
        used += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], out_dir / SINGLE_FILE, metadata={"format": "pt"})
        return
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for file, shard in zip(files, shards, strict=True):
        save_file(shard, out_dir / file, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {name: file for file, shard in zip(files, shards, strict=True) for name in shard},
    }
    (out_dir / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _generator(seed: int, name: str) -> torch.Generator:
    """Every tensor has its own stream, so that adding one changes no other."""
    key = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(key, "little"))
